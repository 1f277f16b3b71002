"""From flags to frozen settings. Imports runtime and the models."""
