"""Credit from rewards."""
