"""From arrays to pictures. Imports models and data."""
