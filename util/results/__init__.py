"""What a run leaves behind, written and read back. Imports runtime and weights."""
