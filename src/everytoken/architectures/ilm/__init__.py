"""Insertion language models: text that grows anywhere (arXiv 2505.05755)."""
