"""Tokens billed: what a provider commits to, and what an auditor can check of it without reading it."""
