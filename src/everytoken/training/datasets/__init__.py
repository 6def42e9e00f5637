"""Data sets that a model makes itself and a program judges."""
