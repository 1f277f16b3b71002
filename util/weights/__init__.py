"""Between checkpoint files, ours and other programs', and models. Imports runtime, models, data, config."""
