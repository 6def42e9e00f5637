"""Invented companies with five figures each, a tool a figure: as many tools as one likes, with queries and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError, require
from ..core.rng import numpy_generator
from .base import Key, ToolSpec

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

METRICS = {
    "revenue": ("the total revenue", ("How much did {c} sell in {y}?", "What were the sales of {c} in {y}?")),
    "net_income": (
        "the net income",
        ("How much profit did {c} make in {y}?", "What did {c} earn after costs in {y}?"),
    ),
    "employees": (
        "the number of employees",
        ("How many people worked for {c} in {y}?", "How large was the staff of {c} in {y}?"),
    ),
    "share_price": (
        "the price of a share",
        ("What did a share of {c} cost in {y}?", "How was {c} valued on the exchange in {y}?"),
    ),
    "debt": ("the long-term debt", ("How much did {c} owe in {y}?", "What were the liabilities of {c} in {y}?")),
}
"""Metric -> what its tool returns, and questions in other words."""
HEADS: tuple[str, ...] = ("Nor", "Vel", "Quan", "Bri", "Tas", "Mor", "Kel", "Zan", "Hol", "Per", "Lum", "Dra")
HEADS += ("Fen", "Gal", "Ost", "Rin", "Syl", "Tor", "Ulm", "Wex", "Yar", "Cor", "Bel", "Ald")
MIDDLES = ("ta", "li", "ro", "ven", "dex", "mar", "so", "nu", "pha", "ki")
TAILS = ("Foods", "Steel", "Motors", "Energy", "Systems", "Textiles", "Bank", "Pharma", "Shipping", "Media", "Paper")


def companies(count: int, seed: int = 0) -> list[str]:
    """Names of different companies.

    Raises:
        BadInputError: fewer than one, or more than there are names.
    """
    every = [f"{head}{middle} {tail}" for head in HEADS for middle in MIDDLES for tail in TAILS]
    if not 1 <= count <= len(every):
        raise BadInputError(f"There are 1 to {len(every)} companies; asked for {count}.")
    return [every[place] for place in numpy_generator(seed, "companies").permutation(len(every))[:count]]


def metric_tools(names: Sequence[str]) -> list[ToolSpec]:
    """Five tools of every company; the company is their server."""
    tools = []
    for company in names:
        short = company.lower().replace(" ", "_")
        for metric, (told, _) in METRICS.items():
            schema = {
                "type": "object",
                "properties": {"year": {"type": "integer", "description": "The fiscal year."}},
                "required": ["year"],
            }
            tools.append(
                ToolSpec(short, f"{short}_{metric}", f"Returns {told} of {company} for a fiscal year.", schema)
            )
    return tools


@dataclass(frozen=True)
class Asked:
    """A query and the tools that answer it."""

    query: str
    relevant: frozenset[Key]


def metric_queries(names: Sequence[str], count: int, seed: int = 0) -> list[Asked]:
    """Queries in other words than the tools' descriptions, each about one figure of one company."""
    generator, found = numpy_generator(seed, "queries"), []
    for _ in range(count):
        company, metric = (
            names[int(generator.integers(len(names)))],
            list(METRICS)[int(generator.integers(len(METRICS)))],
        )
        ways = METRICS[metric][1]
        way, year = ways[int(generator.integers(len(ways)))], int(generator.integers(2005, 2025))
        short = company.lower().replace(" ", "_")
        found.append(Asked(way.format(c=company, y=year), frozenset({Key(short, f"{short}_{metric}")})))
    return found


def metric_server(company: str) -> MCPServer:
    """A real server with a company's five tools, in this process."""
    require("mcp", "agents", "Making servers of tools")
    from mcp.server.mcpserver import MCPServer

    server, short = MCPServer(company), company.lower().replace(" ", "_")
    for metric, (told, _) in METRICS.items():

        def figure(year: int, metric: str = metric) -> str:
            return f"{metric} of {company} in {year}: {(len(company) * 7919 + year * 31 + len(metric)) % 9973}"

        server.add_tool(
            _of_year(figure), f"{short}_{metric}", description=f"Returns {told} of {company} for a fiscal year."
        )
    return server


def _of_year(figure: Callable[[int], str]) -> Any:
    """A function of the year alone, so that its default argument is no parameter of the tool."""

    def of_year(year: int) -> str:
        return figure(year)

    return of_year
