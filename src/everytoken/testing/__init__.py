"""Conformance batteries: what every implementation of a contract promises, as tests that outside packages can run too."""
