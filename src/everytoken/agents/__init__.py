"""Tokens spent on tools and plans: what an agent may call, how it finds it, and how it plans."""
