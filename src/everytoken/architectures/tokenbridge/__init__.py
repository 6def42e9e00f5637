"""TokenBridge: continuous latents cut into bins after training, spelled channel by channel (arXiv 2503.16430)."""
