"""Conformance batteries: checks that a method of your own keeps its contract."""
