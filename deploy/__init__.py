"""Reads nothing on import: the service that draws images with a registered model."""
