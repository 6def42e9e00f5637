"""Grammars and how they are written: EBNF, regular expressions, JSON Schema, structural tags, and their automata."""

from .grammar import Grammar, GrammarError
from .structural_tags import StructuralTag

__all__ = ["Grammar", "GrammarError", "StructuralTag"]
