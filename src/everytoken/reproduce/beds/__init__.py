"""Test beds: what several experiments start from, learn from and are measured by (``base`` has the contract)."""
