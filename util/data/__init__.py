"""From disk to a batch. Imports runtime; knows no settings and no model."""
