"""Analyse features; never train. Imports weights, figures, data, config, models, runtime."""
