"""Weights of 4 and 8 bits in groups of 32 on a CPU: how they are made, and the kernels that multiply with them."""
