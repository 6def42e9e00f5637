"""Adapters to other frameworks, each importing its framework where it is used."""
