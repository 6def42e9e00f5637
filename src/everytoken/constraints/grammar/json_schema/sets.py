"""The sub-schemas of a JSON Schema document: checked, found by ``$ref``, and gathered into sets that apply together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NoReturn

from ..expressions import GrammarError
from .keywords import ANNOTATIONS, NEAR, NEAR_SHAPES, REFUSED, STRINGS_AND_NUMBERS, SUPPORTED
from .options import SchemaOptions

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SchemaObject = dict[str, Any]
"""A schema as JSON gives it; ``SchemaSets.check`` has seen the types of its keywords' values."""
Schema = bool | SchemaObject
Place = tuple[Schema, str]
"""A schema and the JSON pointer to it."""
Part = tuple[SchemaObject, str]
"""The same where it is no boolean; the parts of a set hold together."""
Parts = Sequence[Part]
SHAPES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}

SIMPLE = STRINGS_AND_NUMBERS | {"nullable", "minItems", "maxItems", "minProperties", "maxProperties"}
"""Keywords whose values hold no schemas and no lists."""
SILENT = ANNOTATIONS | {"$ref"}

Member = tuple[int, bool]
"""A sub-schema (by its place in the converter's list) and whether its ``anyOf``/``oneOf`` have been decided."""


class SchemaSets:
    """The sub-schemas that have been met, by number, and the sets that ``$ref`` and ``allOf`` make of them."""

    def __init__(self, document: Schema, options: SchemaOptions):
        self.document, self.options = document, options
        self.schemas: list[Schema] = []
        self.pointers: list[str] = []
        self.numbers: dict[int, int] = {}
        self.leaves: dict[tuple[tuple[str, str], ...], int] = {}  # by what they say: the numbers of simple schemas
        self.copies: list[Schema] = []  # kept, so that no other schema gets their identity
        self.warned: set[str] = set()
        self.flat: dict[int, tuple[int, ...]] = {}
        self.complements: dict[int, tuple[Schema, Schema]] = {}  # by identity: a schema, and what it excludes
        self._collect_resources()

    # -- bookkeeping --------------------------------------------------------------------------------------------------
    def fail(self, pointer: str, message: str, hint: str | None = None) -> NoReturn:
        raise GrammarError(f"Schema at {pointer or '#'}: {message}", hint)

    def unsupported(self, pointer: str, what: str, hint: str) -> None:
        if self.options.strict:
            raise GrammarError(
                f"Schema at {pointer or '#'}: {what} is not supported.", f"{hint} (strict=False ignores it.)"
            )
        self.warn(f"{pointer or '#'}: {what} is ignored; outputs may violate it.")

    def warn(self, line: str) -> None:
        """Says something once."""
        if line not in self.warned:
            self.warned.add(line)
            warnings.warn(line, stacklevel=6)

    def number(self, schema: Schema, pointer: str) -> int:
        if id(schema) not in self.numbers:
            self.check(schema, pointer)
            following = len(self.schemas)
            said = _said(schema)  # schemas that say the same, as most leaves do, are one: so are the rules made of them
            found = following if said is None else self.leaves.setdefault(said, following)
            self.numbers[id(schema)] = found
            self.copies.append(schema)
            if found == following:
                self.schemas.append(schema)
                self.pointers.append(pointer)
        return self.numbers[id(schema)]

    def check(self, schema: Schema, pointer: str) -> None:
        """Types of keyword values, and unknown or unsupported keywords."""
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            self.fail(
                pointer, f"a schema is an object or a boolean, not {type(schema).__name__}.", "Check the nesting."
            )
        shapes: dict[str, type] = {
            "properties": dict, "patternProperties": dict, "required": list, "enum": list, "anyOf": list, "oneOf": list,
            "allOf": list, "prefixItems": list, "pattern": str, "format": str, "$ref": str,
        }  # fmt: skip
        for key, shape in shapes.items():
            if key in schema and not isinstance(schema[key], shape):
                self.fail(at(pointer, key), f"{key} must be {SHAPES[shape]}, not {type(schema[key]).__name__}.")
        for name in schema.get("required", ()):
            if not isinstance(name, str):
                self.fail(at(pointer, "required"), f"required must list names, not {name!r}.", "Names are strings.")
        for key in ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"):
            if key in schema:
                value = schema[key]
                if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
                    self.fail(at(pointer, key), f"{key} must be a whole number of at least 0; got {value!r}.")
        for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"):
            if key in schema and (isinstance(schema[key], bool) or not isinstance(schema[key], (int, float, Decimal))):
                bound = key.replace("exclusiveM", "m")
                if isinstance(schema[key], bool) and bound != key:  # draft 4: it says how to read the bound beside it
                    if schema[key] and bound not in schema:
                        self.fail(
                            at(pointer, key), f"{key} must be a number; got True without {bound}.", f"Give {bound}."
                        )
                    continue
                self.fail(at(pointer, key), f"{key} must be a number; got {schema[key]!r}.")
        for key in ("anyOf", "oneOf", "allOf"):
            if schema.get(key) == []:
                self.fail(at(pointer, key), f"{key} must not be empty.")
        given = schema.get("type", [])
        for name in given if isinstance(given, list) else [given]:
            if name not in TYPES:
                self.fail(at(pointer, "type"), f"unknown type {name!r}.", f"Known: {', '.join(TYPES)}.")
        for key in ("dependentRequired", "dependentSchemas", "dependencies"):
            if not isinstance(schema.get(key, {}), dict):
                self.fail(at(pointer, key), f"{key} must be an object, not {type(schema[key]).__name__}.")
        for key in schema:
            if key in REFUSED:
                self.unsupported(pointer, key, REFUSED[key])
            elif key not in SUPPORTED and key not in ANNOTATIONS and not key.startswith(("x-", "$", "\0")):
                self._warn_if_misspelt(schema, key, pointer)

    def _warn_if_misspelt(self, schema: SchemaObject, key: str, pointer: str) -> None:
        """By the standard, unknown keywords say nothing; one that looks like a known one is worth a word."""
        import difflib

        close = difflib.get_close_matches(key, NEAR, n=1, cutoff=0.8)
        if close and isinstance(schema[key], NEAR_SHAPES.get(close[0], object)):
            self.warn(f"{pointer or '#'}: the unknown keyword {key!r} is ignored. Did you mean {close[0]!r}?")

    # -- sets of sub-schemas ------------------------------------------------------------------------------------------
    def flatten(self, index: int, path: tuple[int, ...] = ()) -> tuple[int, ...]:
        """A sub-schema and all that ``$ref`` and ``allOf``, ``not``, ``if`` and dependencies bring along."""
        if index in self.flat:
            return self.flat[index]
        if index in path:
            self.fail(
                self.pointers[index], "a $ref leads back to itself without describing anything.", "Break the cycle."
            )
        if len(path) > 200:
            self.fail(self.pointers[index], "more than 200 $ref and allOf in a chain.", "Shorten it.")
        schema, pointer = self.schemas[index], self.pointers[index]
        members: dict[int, None] = {index: None}
        if isinstance(schema, dict):
            if "$ref" in schema:
                target, where = self.resolve(schema["$ref"], schema, pointer)
                members |= dict.fromkeys(self.flatten(self.number(target, where), (*path, index)))
            for place, part in enumerate(schema.get("allOf", ())):
                members |= dict.fromkeys(self.flatten(self.number(part, at(pointer, f"allOf/{place}")), (*path, index)))
            for part, where in self.rewritten(schema, pointer):
                members |= dict.fromkeys(self.flatten(self.number(part, where), (*path, index)))
        self.flat[index] = tuple(members)
        return self.flat[index]

    def rewritten(self, _schema: SchemaObject, _pointer: str) -> Iterator[Place]:
        """What ``not``, ``if`` and dependencies say, in other words (``negation``)."""
        return iter(())

    def resolve(self, reference: str, schema: SchemaObject, pointer: str) -> Place:
        """The schema that a ``$ref`` names, within this document."""
        from urllib.parse import unquote, urljoin

        base, _, fragment = reference.partition("#")
        uri = self.bases.get(id(schema), "")
        if base:
            uri = urljoin(uri, base)
        if uri not in self.resources:
            self.fail(
                pointer,
                f"$ref {reference!r} leads outside the document.",
                "Copy that schema under $defs and refer to it.",
            )
        if fragment and not fragment.startswith("/"):
            if (uri, fragment) not in self.anchors:
                self.fail(pointer, f"$ref {reference!r}: there is no such anchor.", "Check its spelling.")
            return self.anchors[uri, fragment]
        steps = [unquote(part).replace("~1", "/").replace("~0", "~") for part in fragment.split("/")[1:]]
        resource = self.resources[uri]
        found, missing = _followed(resource, steps)
        if missing is not None and not base and resource[0] is not self.document:
            whole, absent = _followed((self.document, "#"), steps)
            if absent is None:
                self.warn(
                    f"{pointer}: $ref {reference!r} leads nowhere within {resource[1]}, which has an identifier of its "
                    "own; it is read from the document's root."
                )
                return whole
        if missing is not None:
            target, where = found
            available = ", ".join(list(target)[:8]) if isinstance(target, dict) else "nothing"
            self.fail(
                pointer, f"$ref {reference!r} leads nowhere: no {missing!r} in {where}.", f"There is: {available}."
            )
        return found

    def _collect_resources(self) -> None:
        """Base URIs of all sub-schemas, and what ``$id`` and ``$anchor`` name."""
        from urllib.parse import urljoin

        self.bases: dict[int, str] = {}
        self.resources: dict[str, Place] = {"": (self.document, "#")}
        self.anchors: dict[tuple[str, str], Place] = {}
        pending: list[tuple[Any, str, str]] = [(self.document, "#", "")]
        while pending:
            node, where, base = pending.pop()
            if isinstance(node, dict):
                if any(key.startswith("\0") for key in node if isinstance(key, str)):
                    self.fail(where, "a name that starts with U+0000.", "Rename it.")
                name = node.get("$id", node.get("id"))
                if isinstance(name, str) and name and not name.startswith("#"):
                    base = urljoin(base, name.split("#")[0])
                    self.resources.setdefault(base, (node, where))
                self.bases[id(node)] = base
                for key in ("$anchor", "$dynamicAnchor"):
                    if isinstance(node.get(key), str):
                        self.anchors.setdefault((base, node[key]), (node, where))
                pending += [
                    (value, at(where, f"{escaped(key)}"), base)
                    for key, value in node.items()
                    if key not in ("enum", "const", "default", "examples") and isinstance(value, (dict, list))
                ]
            elif isinstance(node, list):
                pending += [(value, at(where, f"{place}"), base) for place, value in enumerate(node)]

    def members(self, schemas: Iterable[Place]) -> frozenset[Member] | None:
        """The set for schemas that apply together; None if one of them is ``false``."""
        found: set[Member] = set()
        for schema, pointer in schemas:
            if isinstance(schema, bool):  # True and False are shared objects without a place of their own
                if not schema:
                    return None
                continue
            for index in self.flatten(self.number(schema, pointer)):
                part = self.schemas[index]
                if part is False:
                    return None
                if part is not True and part and not (part.keys() <= SILENT and "$ref" in part):
                    found.add((index, False))  # what a bare $ref brings is there without it
        return frozenset(found)

    def without(self, schema: SchemaObject, keyword: str) -> SchemaObject:
        """A copy without a keyword, which counts as the same sub-schema."""
        copy = {key: value for key, value in schema.items() if key != keyword}
        self.copies.append(copy)
        self.numbers[id(copy)] = self.numbers[id(schema)]
        return copy

    def part(self, index: int) -> Part:
        """A member of a set (members are never booleans)."""
        schema = self.schemas[index]
        assert isinstance(schema, dict)
        return schema, self.pointers[index]

    def expand(self, schemas: Sequence[Place]) -> list[Part] | None:
        """The parts of the set for schemas that apply together; None if one of them is ``false``."""
        members = self.members(schemas)
        return None if members is None else [self.part(index) for index, _ in sorted(members)]


def _said(schema: Schema) -> tuple[tuple[str, str], ...] | None:
    """What a schema without schemas in it says, annotations aside; None for others."""
    if not isinstance(schema, dict) or len(schema) > 16:
        return None
    said = []
    for key, value in schema.items():
        if key in SIMPLE or (key == "type" and isinstance(value, str)):
            if not isinstance(value, (str, int, float)):
                return None
            said.append((key, repr(value)))
        elif key not in ANNOTATIONS or key.startswith("$"):
            return None
    return tuple(sorted(said))


def _followed(start: Place, steps: Sequence[str]) -> tuple[Place, str | None]:
    """Where a JSON pointer leads, and its first step that leads nowhere, if one does."""
    target: Any  # any place of a JSON document
    target, where = start
    for step in steps:
        try:
            following = target[int(step)] if isinstance(target, list) else target[step]
        except (KeyError, IndexError, ValueError, TypeError):
            return (target, where), step
        target, where = following, at(where, escaped(step))
    return (target, where), None


def kinds(parts: Parts) -> list[str]:
    """The JSON types that all parts allow, ``number`` or ``integer`` but not both."""
    allowed = set(TYPES)
    for schema, _ in parts:
        if "type" in schema:
            given = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            types = set(given)
            if schema.get("nullable") is True:
                types.add("null")
            if "number" in types:
                types.add("integer")
            allowed &= types
    if "number" in allowed:
        allowed.discard("integer")
    return [kind for kind in TYPES if kind in allowed]


def escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def at(pointer: str, part: str) -> str:
    """A JSON pointer one step further; the middle of very long ones is left out (nested schemas would cost quadratic
    memory)."""
    longer = f"{pointer}/{part}"
    return longer if len(longer) < 400 else f"{longer[:100]}/.../{longer[-200:].partition('/')[2]}"
