"""How documents are written, and how a schema is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ..expressions import GrammarError

ORDERS = ("schema", "required_first", "flexible", "any")


@dataclass(frozen=True)
class SchemaOptions:
    """How documents are written, and how a schema is read.

    Attributes:
        any_whitespace: white space anywhere between tokens, as JSON allows; otherwise exactly ``separators``.
        max_whitespace: with ``any_whitespace``, at most so many blanks at a place (models can loop in them); None:
        no limit.
        indent: pretty-print with so many spaces a level, as ``json.dumps(indent=...)`` (implies no other white
        space); such
            documents are nested at most 12 levels deep.
        separators: between items and after keys; default ``(", ", ": ")``, or ``(",", ": ")`` with ``indent``.
        strict_mode: objects that list ``properties`` (and arrays that list ``prefixItems``) are closed unless they say
            otherwise, as in structured-output services; False reads the schema as the standard does.
        strict: unsupported keywords raise; False warns and ignores them.
        property_order: ``"schema"`` writes properties in the schema's order (further ones at the end);
            ``"required_first"`` also allows the required ones first, in the order of ``required``, as many models write
            them; ``"flexible"`` allows every order where at most 10 properties are required, and otherwise these in
            the order of the schema or of ``required`` with the others between them; of more than 7 properties, an
            optional one may be written twice (readers take the last). ``"any"`` allows every order and every name
            once, for up to 10 properties an object.
    """

    any_whitespace: bool = True
    max_whitespace: int | None = None
    indent: int | None = None
    separators: tuple[str, str] | None = None
    strict_mode: bool = True
    strict: bool = True
    property_order: str = "schema"

    def __post_init__(self) -> None:
        if self.property_order not in ORDERS:
            raise GrammarError(f"property_order is one of {', '.join(ORDERS)}; got {self.property_order!r}.")
        for name in ("indent", "max_whitespace"):
            value = getattr(self, name)
            if value is not None and (value < 0 or value > 1000):
                raise GrammarError(f"{name} must lie between 0 and 1000; got {value}.")


class SchemaSettings(TypedDict, total=False):
    """The same as keyword arguments, for those who take them."""

    any_whitespace: bool
    max_whitespace: int | None
    indent: int | None
    separators: tuple[str, str] | None
    strict_mode: bool
    strict: bool
    property_order: str
