"""Reads nothing on import: the training loop, its data order, its state, and the trainers of the small networks."""
