"""JSON Schema (draft 2020-12, and what older drafts share with it) as grammar rules.

A schema is taken as the set of all sub-schemas that apply to one place in the document: ``$ref`` and ``allOf`` add
members,
``anyOf`` and ``oneOf`` branch. Such a set becomes one rule, named after its members, so recursive schemas end in
recursive
rules. What a set says about strings, numbers, objects and arrays is merged before anything is built; conditions that
must
hold together (two patterns, a pattern and a length) become intersections of automata.

What cannot be expressed exactly raises, or is ignored with a warning under ``strict=False``. See docs/constraints.md
for the
table of keywords and for the spelling of documents (canonical strings where a pattern, format or enumeration
applies; bounded
numbers without exponents).
"""

from __future__ import annotations

from .converter import schema_rules
from .keywords import SUPPORTED
from .options import SchemaOptions, SchemaSettings
from .sets import Schema

__all__ = ["SUPPORTED", "Schema", "SchemaOptions", "SchemaSettings", "schema_rules"]
