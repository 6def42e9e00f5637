"""Credit from pairs: losses for one trainer. Contract: ``base.PreferenceLoss``."""
