"""Reads nothing on import: the steps after measuring (decide, report, register, release) and what MLflow shows."""
