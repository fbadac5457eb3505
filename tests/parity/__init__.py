"""The numbers of the official code, recorded in data/: ours must be the same."""
