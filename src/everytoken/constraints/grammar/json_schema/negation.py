"""Schemas rewritten: ``not``, ``if`` and dependencies in terms of ``anyOf`` and of keywords' opposites.

The complement of a schema is the union of its keywords' complements, each for the one type of which the keyword
speaks. One level is rewritten at a time (what lies below is a ``not`` again, rewritten when it is met), so recursive
schemas have complements too. Some opposites have no keyword in the standard; they have names of their own here, which
no schema from outside may use (``OPPOSITES``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from ..formats import FORMATS, REFUSED_FORMATS
from ..json_text import Json
from .sets import TYPES, Place, Schema, SchemaObject, SchemaSets, at

NOT_PATTERN, NOT_FORMAT, NOT_ENUM = "\0notPattern", "\0notFormat", "\0notEnum"
NOT_MULTIPLE, NOT_INTEGER = "\0notMultipleOf", "\0notInteger"
SOME_PROPERTY = "\0someProperty"
"""``[names, value]``: some property has a name that the one schema allows and a value that the other one allows."""
SOME_ITEM = "\0someItem"
"""``[first, schema]``: some item, from the place ``first`` on, satisfies the schema."""
OPEN = "\0open"
"""Marks schemas made here that list properties or items and leave further ones open, whatever ``strict_mode`` says."""


def rewritten(schemas: SchemaSets, schema: SchemaObject, pointer: str) -> Iterator[Place]:
    """What ``not``, ``if`` and dependencies of a schema say, in other words; each part holds beside the rest."""
    if "not" in schema:
        yield complement(schemas, schema["not"], at(pointer, "not"))
    if "if" in schema and ("then" in schema or "else" in schema):
        condition = schema["if"]
        yes: SchemaObject = {"allOf": [condition, schema.get("then", True)]}
        no: SchemaObject = {"allOf": [{"not": condition}, schema.get("else", True)]}
        yield {"anyOf": [yes, no]}, at(pointer, "if")
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, needed in schema.get(key, {}).items():
            present: SchemaObject = {"required": [name]}
            if isinstance(needed, list):
                present["required"] = [name, *needed]
            else:
                present["allOf"] = [needed]
            objects: SchemaObject = {"type": "object", **present}
            others: SchemaObject = {"type": [kind for kind in TYPES if kind != "object"]}
            yield {"anyOf": [others, without_property(name), objects]}, at(pointer, key)


def without_property(name: str) -> SchemaObject:
    """Objects that lack a property."""
    return {"type": "object", OPEN: True, "properties": {name: False}}


def complement(schemas: SchemaSets, schema: Schema, pointer: str) -> Place:
    """The schema of all values that do not satisfy ``schema``; always the same object, so that recursion ends."""
    schemas.number(schema, pointer)  # its keywords are checked before their values are turned round
    if isinstance(schema, bool):
        return not schema, pointer
    known = schemas.complements.get(id(schema))
    if known is None:
        options = list(_opposites(schemas, schema, pointer))
        made: Schema = False if not options else options[0] if len(options) == 1 else {"anyOf": options}
        known = schemas.complements[id(schema)] = schema, made
    return known[1], pointer


def _opposites(schemas: SchemaSets, schema: SchemaObject, pointer: str) -> Iterator[Schema]:
    """For each keyword, the values that it excludes."""
    if "$ref" in schema:
        yield {"not": schemas.resolve(schema["$ref"], schema, pointer)[0]}
    if "type" in schema:
        yield from _other_types(schema)
    for key in ("enum", "const"):
        if key in schema:
            yield from _other_values(schema["enum"] if key == "enum" else [schema["const"]])
    if "not" in schema:
        yield schema["not"]
    if "anyOf" in schema:
        yield {"allOf": [{"not": branch} for branch in schema["anyOf"]]}
    if "oneOf" in schema:
        yield {"allOf": [{"not": branch} for branch in schema["oneOf"]]}
        for one, other in combinations(schema["oneOf"], 2):
            yield {"allOf": [one, other]}
    for branch in schema.get("allOf", ()):
        yield {"not": branch}
    if "if" in schema and ("then" in schema or "else" in schema):
        yield {"allOf": [schema["if"], {"not": schema.get("then", True)}]}
        yield {"allOf": [{"not": schema["if"]}, {"not": schema.get("else", True)}]}
    for key in ("dependentRequired", "dependentSchemas", "dependencies"):
        for name, needed in schema.get(key, {}).items():
            rule: Schema = {"required": needed} if isinstance(needed, list) else needed
            yield {"type": "object", "required": [name], "allOf": [{"not": rule}]}
    yield from _strings_and_numbers(schema)
    yield from _arrays(schemas, schema, pointer)
    yield from _objects(schema)
    for key in ("unevaluatedProperties", "unevaluatedItems"):
        if schema.get(key, True) is not True:
            schemas.unsupported(pointer, f"the opposite of {key}", "Use additionalProperties, or items.")
            yield True


def _other_types(schema: SchemaObject) -> Iterator[Schema]:
    given = set(schema["type"] if isinstance(schema["type"], list) else [schema["type"]])
    if schema.get("nullable") is True:
        given.add("null")
    others = [kind for kind in TYPES if kind not in given and kind != "integer"]
    if "integer" in given and "number" in others:
        others.remove("number")
    if others:
        yield {"type": others}
    if "integer" in given and "number" not in given:
        yield {"type": "number", NOT_INTEGER: True}


def _other_values(values: list[Json]) -> Iterator[Schema]:
    """Values beside those listed: of each type, all but the listed ones."""
    simple = [value for value in values if not isinstance(value, (list, dict))]
    nested = [value for value in values if isinstance(value, (list, dict))]
    kinds = ["string", "number"]
    kinds += [] if None in simple else ["null"]
    rest: SchemaObject = {"type": kinds, NOT_ENUM: simple}
    yield rest
    for flag in (True, False):
        if not any(value is flag for value in simple):
            yield {"const": flag}
    for kind, shape in (("array", list), ("object", dict)):
        unlike = [_unlike(value) for value in nested if isinstance(value, shape)]
        yield {"type": kind, "allOf": unlike} if unlike else {"type": kind}


def _unlike(value: list[Json] | dict[str, Json]) -> SchemaObject:
    """Arrays (objects) other than one."""
    size = len(value)
    options: list[Schema] = []
    if isinstance(value, list):
        options += [{"minItems": size + 1}] + ([{"maxItems": size - 1}] if size else [])
        for place, item in enumerate(value):
            options.append(
                {OPEN: True, "minItems": place + 1, "prefixItems": [True] * place + [{"not": {"const": item}}]}
            )
    else:
        options.append({"minProperties": size + 1})
        for name, item in value.items():
            options.append({OPEN: True, "properties": {name: False}})
            options.append({OPEN: True, "required": [name], "properties": {name: {"not": {"const": item}}}})
    return {"anyOf": options}


def _strings_and_numbers(schema: SchemaObject) -> Iterator[Schema]:
    if "pattern" in schema:
        yield {"type": "string", NOT_PATTERN: schema["pattern"]}
    if schema.get("format") in FORMATS or schema.get("format") in REFUSED_FORMATS:
        yield {"type": "string", NOT_FORMAT: schema["format"]}
    if schema.get("minLength", 0) > 0:
        yield {"type": "string", "maxLength": int(schema["minLength"]) - 1}
    if "maxLength" in schema:
        yield {"type": "string", "minLength": int(schema["maxLength"]) + 1}
    for key, exclusive, opposite, strict in (
        ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"),
        ("maximum", "exclusiveMaximum", "minimum", "exclusiveMinimum"),
    ):
        if key in schema:
            yield {"type": "number", opposite if schema.get(exclusive) is True else strict: schema[key]}
        if exclusive in schema and not isinstance(schema[exclusive], bool):
            yield {"type": "number", opposite: schema[exclusive]}
    if "multipleOf" in schema:
        yield {"type": "number", NOT_MULTIPLE: schema["multipleOf"]}


def _arrays(schemas: SchemaSets, schema: SchemaObject, pointer: str) -> Iterator[Schema]:
    if schema.get("minItems", 0) > 0:
        yield {"type": "array", "maxItems": int(schema["minItems"]) - 1}
    if "maxItems" in schema:
        yield {"type": "array", "minItems": int(schema["maxItems"]) + 1}
    older = isinstance(schema.get("items"), list)  # drafts before 2020-12
    prefix: list[Schema] = schema["prefixItems"] if "prefixItems" in schema else schema["items"] if older else []
    further = "additionalItems" if older else "items"
    rest: Schema = schema.get(further, True)
    for place, item in enumerate(prefix):
        yield {
            "type": "array", OPEN: True, "minItems": place + 1, "prefixItems": [True] * place + [{"not": item}],
        }  # fmt: skip
    if rest is not True and rest != {}:
        yield {"type": "array", SOME_ITEM: [len(prefix), {"not": rest}]}
    if schema.get("uniqueItems") is True:
        schemas.unsupported(pointer, "the opposite of uniqueItems", "Say what is allowed instead.")
        yield True
    if "contains" in schema:
        low, high = int(schema.get("minContains", 1)), schema.get("maxContains")
        if low > 0:
            yield {"type": "array", "contains": schema["contains"], "minContains": 0, "maxContains": low - 1}
        if high is not None:
            yield {"type": "array", "contains": schema["contains"], "minContains": int(high) + 1}


def _objects(schema: SchemaObject) -> Iterator[Schema]:
    for name in schema.get("required", ()):
        yield without_property(name)
    if schema.get("minProperties", 0) > 0:
        yield {"type": "object", "maxProperties": int(schema["minProperties"]) - 1}
    if "maxProperties" in schema:
        yield {"type": "object", "minProperties": int(schema["maxProperties"]) + 1}
    for name, value in schema.get("properties", {}).items():
        if value is not True and value != {}:
            yield {"type": "object", OPEN: True, "required": [name], "properties": {name: {"not": value}}}
    for pattern, value in schema.get("patternProperties", {}).items():
        if value is not True and value != {}:
            yield {"type": "object", SOME_PROPERTY: [{"pattern": pattern}, {"not": value}]}
    further = schema.get("additionalProperties", True)
    if further is not True and further != {}:
        names: list[Schema] = [{NOT_ENUM: list(schema["properties"])}] if schema.get("properties") else []
        names += [{NOT_PATTERN: pattern} for pattern in schema.get("patternProperties", ())]
        yield {"type": "object", SOME_PROPERTY: [{"allOf": names} if names else True, {"not": further}]}
    if "propertyNames" in schema:
        yield {"type": "object", SOME_PROPERTY: [{"not": schema["propertyNames"]}, True]}
