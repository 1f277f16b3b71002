"""Trainer, run and evaluation, for every kind of training. Imports all wings above; never an engine."""
