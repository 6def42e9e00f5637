"""Duo-LLM: a small feed-forward block beside each large one, as a transformers model, with an oracle of routes."""
