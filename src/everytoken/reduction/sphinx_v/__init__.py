"""SPHINX-V: points and boxes on an image as tokens of the language model (arXiv 2403.20271)."""
