"""What a process stands on: ranks, precision, errors, logs, signals, durable files. Imports nothing of ours."""
