"""Which tokens are allowed: the grammar engine (XGrammar) and adaptive weighted rejection sampling (AWRS)."""
