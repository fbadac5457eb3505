"""Reads nothing on import: picklable batch callables, one unit of work each: encode, score, sample."""
