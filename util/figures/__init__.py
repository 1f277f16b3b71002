"""From arrays to pictures. Imports runtime, models and data."""
