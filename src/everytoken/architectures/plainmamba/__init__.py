"""PlainMamba: images read by snakes in four directions, with the direction told to the scan (arXiv 2403.17695)."""
