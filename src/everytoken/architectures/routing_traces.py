"""What routers decided, shown: a trace for each router, and the tokens of every expert as a table."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import torch

from ..core.trace import TokenTrace
from .routing import RouterRecord

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from .routing_analysis import RoutingAnalysis

EXPERT_COLUMNS = ("expert", "choices", "weight", "served")


def expert_trace(
    record: RouterRecord, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None = None, title: str = ""
) -> TokenTrace:
    """A router's choices over one text, as ``EXPERT_COLUMNS``: the first choice by name, all choices with those that
    were dropped in brackets, the summed weight of the served ones, and how many were served.

    Args:
        record: of a forward over this text alone.
        ids: the text's tokens.
        tokenizer: gives the tokens their text.
        title: default the router's name.
    """
    kept, indices = record.kept.tolist(), record.indices.tolist()
    choices = [
        " ".join(str(expert) if served else f"({expert})" for expert, served in zip(row, serves, strict=True))
        for row, serves in zip(indices, kept, strict=True)
    ]
    trace = TokenTrace(list(ids), title=title or record.layer, station="architectures")
    trace.add("expert", [f"expert {expert}" for expert in record.first().tolist()])
    trace.add("choices", choices)
    trace.add("weight", record.scores.float().sum(-1))
    trace.add("served", record.kept.sum(-1))
    return trace if tokenizer is None else trace.with_text(tokenizer)


def routing_figures(records: Sequence[RouterRecord]) -> dict[str, float]:
    """How evenly the experts were used on one text, and what was dropped; means over routers."""
    busiest, dropped = [], []
    for record in records:
        shares = torch.bincount(record.indices.flatten(), minlength=record.num_experts).float()
        busiest.append(float(shares.max() / shares.mean()))
        dropped.append(float((~record.kept).float().mean()))
    return {
        "busiest expert over the mean": sum(busiest) / len(busiest),
        "% of choices dropped": 100 * sum(dropped) / len(dropped),
    }


def expert_table(analysis: RoutingAnalysis, name: Callable[[int], str], layer: int = 0, number: int = 12) -> str:
    """The tokens that chose each expert first most often, as an HTML table.

    Args:
        analysis: of texts.
        name: token id -> how to write it.
        layer: which router.
        number: tokens an expert.
    """
    shares = analysis.load()[layer] if analysis.layers else []
    rows = [
        f"<tr><td>expert {expert}</td><td>{100 * share:.1f}%</td>"
        f"<td>{' '.join(f'<code>{escape(name(token))}</code>' for token in tokens)}</td></tr>"
        for expert, (tokens, share) in enumerate(zip(analysis.experts(layer, number), shares, strict=True))
    ]
    head = "<tr><th>expert</th><th>share of choices</th><th>its most frequent tokens</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def byte_name(token: int) -> str:
    """A token of ``byte_text`` as a reader knows it."""
    return repr(chr(token - 3))[1:-1].replace(" ", "␣") if token >= 3 else f"<{token}>"
