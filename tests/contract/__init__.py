"""Promises between the parts: the tree, the pins, the addresses others rely on."""
