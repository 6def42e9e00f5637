"""TokenBridge: continuous latents cut into bins after training, spelt channel by channel (arXiv 2503.16430)."""
