"""The report of a run: numbers (data), sections in one language (sections), and their renderings (render)."""
