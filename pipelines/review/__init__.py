"""Reads nothing on import: people compare the aligned model with guidance, blind, on a page of their own."""
