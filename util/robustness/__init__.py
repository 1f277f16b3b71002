"""Table 5: robustness of classifiers. Imports tables and what tables may import."""
