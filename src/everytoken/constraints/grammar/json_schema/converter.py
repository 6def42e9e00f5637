"""From a schema to rules: one for each set of sub-schemas that is met (see the package's docstring)."""

from __future__ import annotations

import json
from typing import Unpack

from ..expressions import NOTHING, Bytes, Expression, GrammarError, Repeat, Rules, alt, seq, star
from ..json_text import QUOTE, WS
from .arrays import array_rule
from .combination import branches, branching, enumeration, refuse_cycle
from .names import strings_of
from .objects import object_rule
from .options import SchemaOptions, SchemaSettings
from .rules import SchemaRules
from .sets import Member, Schema, kinds
from .strings_and_numbers import free_string, number_rule, string_rule


def schema_rules(schema: Schema | str | bytes, **options: Unpack[SchemaSettings]) -> Rules:
    """The rules of a schema, ``root`` among them; see ``Grammar.from_json_schema``."""
    known = set(SchemaOptions.__dataclass_fields__)
    for name in options:
        if name not in known:
            from ....core.errors import UnknownNameError

            raise UnknownNameError("JSON Schema option", name, known)
    document: Schema
    if isinstance(schema, (str, bytes)):
        try:
            document = json.loads(schema)
        except json.JSONDecodeError as error:
            raise GrammarError(
                f"The schema is not JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
                "Check quotes and commas.",
            ) from error
        except (RecursionError, UnicodeDecodeError) as error:
            raise GrammarError(f"The schema cannot be read: {error}.", "Nest it less deeply; use UTF-8.") from error
    else:
        document = schema
    return convert(SchemaRules(document, SchemaOptions(**options)))


def convert(schemas: SchemaRules) -> Rules:
    """All rules of a document, from its root on."""
    blank = schemas.options.max_whitespace
    schemas.rules["ws"] = star(WS) if blank is None else Repeat(WS, 0, blank)
    schemas.rules["string"] = free_string()
    root = schemas.sub([(schemas.document, "#")], 0)
    while schemas.pending:
        name, members, depth = schemas.pending.pop()
        schemas.rules[name] = body(schemas, members, depth)
    schemas.rules["root"] = root
    return schemas.rules


def body(schemas: SchemaRules, members: frozenset[Member], depth: int) -> Expression:
    """The documents of one set."""
    parts = [schemas.part(index) for index, _ in sorted(members)]
    undecided = [index for index, decided in sorted(members) if not decided and branching(schemas.part(index)[0])]
    for index in undecided:
        refuse_cycle(schemas, index)
    if any("enum" in schema or "const" in schema for schema, _ in parts):
        return enumeration(schemas, parts, depth)
    if not kinds(parts):
        return NOTHING
    if len(undecided) > 1 and kinds(parts) == ["string"]:
        return seq(QUOTE, strings_of(schemas, parts), QUOTE)
    if undecided:
        return branches(schemas, members, undecided, depth)
    options: list[Expression] = []
    for kind in kinds(parts):
        if kind == "null":
            options.append(Bytes(b"null"))
        elif kind == "boolean":
            options += [Bytes(b"true"), Bytes(b"false")]
        elif kind in ("number", "integer"):
            options.append(number_rule(schemas, parts, kind == "integer"))
        elif kind == "string":
            options.append(string_rule(schemas, parts))
        elif kind == "object":
            options.append(object_rule(schemas, parts, depth))
        else:
            options.append(array_rule(schemas, parts, depth))
    return alt(*options)
