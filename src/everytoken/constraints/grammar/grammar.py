"""A grammar: named rules and the one to start from, made from EBNF, a regular expression, a JSON Schema, tags or
choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

from ..jit import announce
from .ebnf import parse_ebnf
from .expressions import Alt, Bytes, Expression, GrammarError, Graph, Ref, Repeat, Rules, Seq, alt, seq
from .json_schema import Schema, SchemaSettings, schema_rules
from .regex import regex_automaton
from .structural_tags import structural_expression


@dataclass
class Grammar:
    """Rules by name, and the name of the root.

    Grammars are data: combine them with ``union`` and ``concat``, compile them with ``GrammarCompiler``.
    """

    rules: Rules
    root: str = "root"

    # -- ways to make one ---------------------------------------------------------------------------------------------
    @classmethod
    def from_ebnf(cls, source: str, root_rule_name: str = "root") -> Grammar:
        """From EBNF text (see ``grammar.ebnf``).

        Raises:
            GrammarError: with line and column.
        """
        return cls(parse_ebnf(source, root_rule_name), root_rule_name)

    @classmethod
    def from_regex(cls, pattern: str, search: bool = False) -> Grammar:
        """Texts that the pattern matches as a whole, or (``search``) contain a match of it.

        Raises:
            GrammarError: with the position in the pattern.
        """
        announce()
        return cls({"root": regex_automaton(pattern, search)})

    @classmethod
    def from_choices(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts.

        Raises:
            GrammarError: the list is empty.
        """
        if not choices:
            raise GrammarError("The list of choices is empty.", "Give at least one text.")
        return cls({"root": alt(*(Bytes(choice.encode("utf-8")) for choice in choices))})

    @classmethod
    def from_json_schema(cls, schema: Schema | str | bytes, **options: Unpack[SchemaSettings]) -> Grammar:
        """JSON documents that a schema allows; options as for ``json_schema.SchemaOptions``.

        Args:
            schema: a dict, a bool, or JSON text.

        Raises:
            GrammarError: an invalid, unsatisfiable or (unless ``strict=False``) unsupported schema, with a JSON
            pointer.
        """
        announce()
        return cls(schema_rules(schema, **options))

    @classmethod
    def builtin_json_grammar(cls, **options: Unpack[SchemaSettings]) -> Grammar:
        """Any JSON value; whitespace options as for ``from_json_schema``."""
        return cls.from_json_schema(True, **options)

    @classmethod
    def from_structural_tag(
        cls,
        tags: Sequence[StructuralTag],
        triggers: Sequence[str],
        at_least_one: bool = False,
        stop_after_first: bool = False,
        **options: Unpack[SchemaSettings],
    ) -> Grammar:
        """Free text in which every trigger starts one of the tags; see ``grammar.structural_tags``.

        Args:
            at_least_one: the text must contain a tag.
            stop_after_first: nothing may follow the first tag.
            options: for the tags' JSON schemas.
        """
        rules: Rules = {}
        bodies = []
        for index, tag in enumerate(tags):
            content = tag.content if isinstance(tag.content, Grammar) else cls.from_json_schema(tag.content, **options)
            root = _adopt(rules, content, f"tag{index}_")
            bodies.append((tag.begin, Ref(root), tag.end))
        rules["root"] = structural_expression(triggers, bodies, at_least_one, stop_after_first)
        return cls(rules)

    @staticmethod
    def union(*grammars: Grammar) -> Grammar:
        """Texts of any of the grammars."""
        return _joined(alt, grammars)

    @staticmethod
    def concat(*grammars: Grammar) -> Grammar:
        """A text of the first, then one of the second, and so on."""
        return _joined(seq, grammars)


@dataclass
class StructuralTag:
    """One kind of structured part of a text.

    Attributes:
        begin: the text that opens it; must start with one of the triggers.
        content: what follows: a ``Grammar``, or a JSON Schema (dict, bool or JSON text).
        end: the text that closes it.
    """

    begin: str
    content: Grammar | Schema | str
    end: str


def _adopt(rules: Rules, grammar: Grammar, prefix: str) -> str:
    """Copies a grammar's rules under a prefix; returns the new name of its root."""
    names = {name: prefix + name for name in grammar.rules}
    for name, body in grammar.rules.items():
        rules[names[name]] = rename(body, names)
    return names[grammar.root]


def _joined(how: Callable[..., Expression], grammars: Sequence[Grammar]) -> Grammar:
    if not grammars:
        raise GrammarError("There is no grammar to combine.", "Give at least one.")
    rules: Rules = {}
    roots = [Ref(_adopt(rules, grammar, f"g{index}_")) for index, grammar in enumerate(grammars)]
    rules["root"] = how(*roots)
    return Grammar(rules)


def rename(item: Expression, names: dict[str, str]) -> Expression:
    """The expression with its references renamed."""
    if isinstance(item, Ref):
        return Ref(names[item.name])
    if isinstance(item, (Seq, Alt)):
        return type(item)(tuple(rename(part, names) for part in item.parts))
    if isinstance(item, Repeat):
        return Repeat(rename(item.item, names), item.low, item.high)
    if isinstance(item, Graph):
        edges = tuple((a, rename(label, names), b) for a, label, b in item.edges)
        return Graph(item.size, edges, item.finals, item.reads)
    return item
