"""MrT5: a byte-level T5 that deletes bytes inside its encoder (arXiv 2410.20771)."""
