"""Losses, schedules, optimisers, running means and the watch for non-finite numbers. Imports runtime."""
