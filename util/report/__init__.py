"""The HTML page of one or several runs. Imports tables, analysis and what they may import."""
