"""Token-Shuffle: windows of image tokens fused along the channels before a language model, and spread behind it."""
