"""An extension of griffe: docstrings as Markdown, for the reference pages (literal blocks after ``::``)."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension

LITERAL = re.compile(r"::\n\n((?:(?: {4}.*)?\n)+)(?=\S|\Z)")


def literal_blocks(text: str) -> str:
    """``::`` and an indented block as a fenced one."""

    def fenced(found: re.Match[str]) -> str:
        return f":\n\n```text\n{textwrap.dedent(found[1]).strip()}\n```\n\n"

    return LITERAL.sub(fenced, text + "\n").strip()


class Docstrings(Extension):
    """Rewrites every docstring once it is loaded."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for every object."""
        if getattr(obj, "docstring", None) is not None:
            obj.docstring.value = literal_blocks(obj.docstring.value)
