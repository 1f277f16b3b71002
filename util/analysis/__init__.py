"""What features hold; never trains. Imports weights, figures, data, config, models, runtime."""
