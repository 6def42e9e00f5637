"""HAT: bytes inside words, a causal network over words (arXiv 2501.10322)."""
