"""The parts of cca_core one by one: what each accepts, refuses and returns."""
