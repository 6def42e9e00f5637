"""Many tokens become fewer: reducers of visual tokens, and what runs them inside transformers' models."""
