"""Grammars and how they are written: EBNF, regular expressions, JSON Schema, structural tags, and their automata."""

from .expressions import GrammarError
from .grammar import Grammar, StructuralTag

__all__ = ["Grammar", "GrammarError", "StructuralTag"]
