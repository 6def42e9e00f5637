"""Lexinvariant language models: symbols without fixed embeddings (arXiv 2305.16349)."""
