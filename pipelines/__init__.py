"""Reads nothing on import: Ray, MLflow and recipes around cca_core. No tensor maths here."""
