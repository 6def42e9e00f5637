"""TokenPacker: a projector of fewer, finer tokens (arXiv 2407.02392)."""
