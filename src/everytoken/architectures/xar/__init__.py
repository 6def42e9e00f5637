"""xAR: images drawn entity by entity by flow matching, which learns from a noisy context (arXiv 2502.20388)."""
