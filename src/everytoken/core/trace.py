"""TokenTrace: what happened to every token, as columns aligned to the tokens of one text.

Any method can fill one: a decoder (round, accepted depth, draft probability), a loss (implicit reward, KL), a tokenizer
(which token was split, and into what). A trace prints as coloured text in a terminal (``print``), renders as one
self-contained HTML file (``to_html``, by ``core.trace_html``), and is saved and loaded as Parquet or JSONL.

Producers make a trace only where it is enabled: an unused trace costs one comparison.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from .colours import category, ink, shade
from .errors import BadInputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

Value = float | int | str | bool | None
Column: TypeAlias = "Iterable[Value] | np.ndarray | torch.Tensor"


@dataclass
class TokenTrace:
    """Tokens with any number of named columns.

    Attributes:
        ids: token ids.
        columns: name -> one value a token: numbers, strings, booleans, or None where a column does not apply.
        texts: the tokens as text, filled by ``with_text`` or by the producer. Pieces of a character that spans tokens
            read as the replacement character; ``spans`` are exact.
        spans: ``(start, end)`` byte offsets of each token in the UTF-8 text.
        title, station: shown in the header.
    """

    ids: list[int]
    columns: dict[str, list[Value]] = field(default_factory=dict)
    texts: list[str] | None = None
    spans: list[tuple[int, int]] | None = None
    title: str = ""
    station: str = ""

    def __post_init__(self) -> None:
        self.ids = [int(item) for item in self.ids]
        for name, column in list(self.columns.items()):
            self.columns[name] = self._checked(name, column)
        for name, aligned in (("texts", self.texts), ("spans", self.spans)):
            if aligned is not None and len(aligned) != len(self.ids):
                raise BadInputError(f"{name} has {len(aligned)} entries for {len(self.ids)} tokens.")
        if self.spans is not None:
            self.spans = [(int(start), int(end)) for start, end in self.spans]

    def _checked(self, name: str, column: Column) -> list[Value]:
        values = column.tolist() if hasattr(column, "tolist") else list(column)
        if len(values) != len(self.ids):
            raise BadInputError(
                f"Column {name!r} has {len(values)} values for {len(self.ids)} tokens.",
                "Give one value for each token.",
            )
        return [value.item() if hasattr(value, "item") else value for value in values]

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, name: str, column: Column) -> TokenTrace:
        """Adds (or replaces) a column of one value a token (list, numpy or torch); returns the trace."""
        self.columns[name] = self._checked(name, column)
        return self

    def with_text(self, tokenizer: PreTrainedTokenizerBase) -> TokenTrace:
        """Fills ``texts`` and ``spans`` with the tokenizer's own bytes; returns the trace.

        Where it is not known how a tokenizer spells its tokens, they are decoded one by one, and there are no spans.
        """
        from .vocabulary import token_bytes

        try:
            table = token_bytes(tokenizer)
        except BadInputError:
            self.texts, self.spans = [tokenizer.decode([item]) for item in self.ids], None
            return self
        pieces = [(table[item] or b"") if 0 <= item < len(table) else b"" for item in self.ids]
        special = {item: token.content.encode() for item, token in tokenizer.added_tokens_decoder.items()}
        pieces = [piece or special.get(item, b"") for item, piece in zip(self.ids, pieces, strict=True)]
        self.texts = [piece.decode("utf-8", "replace") for piece in pieces]
        ends, total = [], 0
        for piece in pieces:
            ends.append((total, total + len(piece)))
            total += len(piece)
        self.spans = ends
        return self

    @property
    def labels(self) -> list[str]:
        """The text of each token, or ``<id>`` where unknown."""
        return self.texts if self.texts is not None else [f"<{item}>" for item in self.ids]

    def numeric(self, name: str) -> bool:
        """Whether a column holds numbers (Nones aside) and not categories.

        Raises:
            BadInputError: there is no such column.
        """
        if name not in self.columns:
            raise BadInputError(f"The trace has no column {name!r}.", f"It has: {', '.join(self.columns) or 'none'}.")
        values = [value for value in self.columns[name] if value is not None]
        return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)

    def limits(self, name: str) -> tuple[float, float]:
        """Least and greatest finite value of a numeric column."""
        values = [float(v) for v in self.columns[name] if isinstance(v, (int, float)) and math.isfinite(v)]
        return (min(values), max(values)) if values else (0.0, 0.0)

    def colours(self, name: str) -> list[str | None]:
        """One ``#rrggbb`` a token for a column; None where it has no value."""
        if self.numeric(name):
            low, high = self.limits(name)
            return [shade(value, low, high) for value in self.columns[name]]
        names = self.categories(name)
        return [None if value is None else category(names.index(str(value))) for value in self.columns[name]]

    def categories(self, name: str) -> list[str]:
        """The distinct values of a categorical column in order of appearance."""
        return list(dict.fromkeys(str(value) for value in self.columns[name] if value is not None))

    # -- terminal ------------------------------------------------------------------------------------------------------
    def render(self, column: str | None = None, width: int = 8) -> Text:
        """The text with each token on the colour of its value, and a legend below (rich Text).

        Args:
            column: default the first one.
            width: steps of the legend's scale.
        """
        from rich.text import Text

        output = Text()
        if column is None:
            column = next(iter(self.columns), None)
        colours = self.colours(column) if column is not None else [None] * len(self)
        for label, colour in zip(self.labels, colours, strict=True):
            shown = label.replace("\r", "").replace("\t", "    ")
            style = f"{ink(colour)} on {colour}" if colour else ""
            head, *rest = shown.split("\n")  # a coloured newline would paint the rest of the terminal's line
            output.append(head or ("" if rest else "·"), style)
            for line in rest:
                output.append("⏎", style)
                output.append("\n")
                output.append(line, style)
        output.append("\n")
        if column is not None:
            output.append_text(self._legend(column, width))
        return output

    def _legend(self, column: str, width: int) -> Text:
        from rich.text import Text

        legend = Text(f"\n{column}  ", style="bold")
        if self.numeric(column):
            low, high = self.limits(column)
            legend.append(f"{low:.3g} ", style="not bold")
            for step in range(width):
                legend.append("  ", style=f"on {shade(step, 0, max(width - 1, 1))}")
            legend.append(f" {high:.3g}", style="not bold")
        else:
            for index, name in enumerate(self.categories(column)):
                colour = category(index)
                legend.append(f" {name} ", style=f"not bold {ink(colour)} on {colour}")
                legend.append(" ")
        if any(value is None for value in self.columns[column]):
            legend.append("  uncoloured: no value", style="not bold dim")
        return legend

    def print(self, column: str | None = None, console: Console | None = None) -> None:
        """Prints ``render(column)`` (and the title)."""
        from rich.console import Console

        console = console or Console()
        if self.title:
            console.print(f"[bold]{self.title}[/]  [dim]{len(self)} tokens[/]", highlight=False)
        console.print(self.render(column))

    # -- HTML ----------------------------------------------------------------------------------------------------------
    def to_html(self, path: str | os.PathLike[str] | None = None, column: str | None = None) -> str:
        """One self-contained page: selector for the score, hover for all values, light and dark; optionally written."""
        from .trace_html import render_html

        return render_html([self], path, column)

    # -- storage -------------------------------------------------------------------------------------------------------
    def rows(self) -> list[dict[str, Value]]:
        """One dict a token: ``id``, ``text``, ``start``, ``end`` and the columns."""
        starts: Sequence[tuple[int | None, int | None]] = self.spans or [(None, None)] * len(self)
        texts: Sequence[str | None] = self.texts or [None] * len(self)
        return [
            dict[str, Value](id=item, text=text, start=span[0], end=span[1])
            | {name: column[index] for name, column in self.columns.items()}
            for index, (item, text, span) in enumerate(zip(self.ids, texts, starts, strict=True))
        ]

    def _meta(self) -> dict[str, int | str | list[str]]:
        return {"everytoken_trace": 1, "title": self.title, "station": self.station, "columns": list(self.columns)}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``.jsonl`` or ``.parquet`` (needs pyarrow), by the file's ending."""
        path = Path(path)
        if path.suffix == ".jsonl":
            lines = [json.dumps(self._meta())] + [json.dumps(_finite(row), ensure_ascii=False) for row in self.rows()]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        elif path.suffix == ".parquet":
            from .errors import require

            require("pyarrow", "train", "Saving a trace as Parquet")
            import pyarrow as pa
            import pyarrow.parquet as pq

            names = ["id", "text", "start", "end", *self.columns]
            rows = self.rows()
            table = pa.table({name: [row[name] for row in rows] for name in names})
            pq.write_table(table.replace_schema_metadata({"everytoken": json.dumps(self._meta())}), path)
        else:
            raise BadInputError(f"A trace is saved as .jsonl or .parquet, not {path.suffix or path.name!r}.")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TokenTrace:
        """Reads what ``save`` wrote.

        Raises:
            BadInputError: the file is not a trace, or is damaged.
        """
        path = Path(path)
        if not path.is_file():
            raise BadInputError(f"There is no trace file {path}.")
        try:
            if path.suffix == ".parquet":
                import pyarrow.parquet as pq

                table = pq.read_table(path)
                meta = json.loads(table.schema.metadata[b"everytoken"])
                rows = table.to_pylist()
            else:
                head, *lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
                meta = json.loads(head)
                rows = [_infinite(json.loads(line)) for line in lines]
            names = meta["columns"]
            texts = [row["text"] for row in rows]
            spans = [(row["start"], row["end"]) for row in rows]
            return cls(
                [row["id"] for row in rows],
                {name: [row[name] for row in rows] for name in names},
                None if None in texts else texts,
                None if (rows and spans[0][0] is None) or not rows else spans,
                meta["title"],
                meta["station"],
            )
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise BadInputError(f"{path} is not a readable trace: {error}") from error


_SPECIAL = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _finite(row: dict[str, Value]) -> dict[str, Value | dict[str, str]]:
    """Non-finite floats as ``{"float": "NaN"}``, since JSON has no name for them."""

    def encode(value: Value) -> Value | dict[str, str]:
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
        return value

    return {name: encode(value) for name, value in row.items()}


def _infinite(row: dict[str, Value | dict[str, str]]) -> dict[str, Value]:
    return {name: _SPECIAL[value["float"]] if isinstance(value, dict) else value for name, value in row.items()}
