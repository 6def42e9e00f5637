"""ScaleMCP's claims: tools are found among thousands, and a sync costs only what has changed.

One store holds generated servers (companies with five figures each; 500 tools, 5,000 at the largest scale) and is asked
in other words than those of the descriptions. Another holds function documents of the Berkeley function-calling
leaderboard (``bfcl-eval``, where it is installed) and is asked with that leaderboard's own questions. Every retriever
answers the same questions: TDWA, the embedding of the joined text with and without questions, questions alone, BM25,
and TDWA with BM25. Then the servers are synced cold, unchanged and with one company in a hundred changed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..agents.base import ToolSpec
    from ..agents.metric_tools import Asked
    from ..core.results import Values

TDWA, CONCAT, PLAIN = "TDWA", "joined text", "joined text, no questions"
QUESTIONS, WORDS, HYBRID = "questions alone", "BM25", "TDWA and BM25"
BEDS = ("companies", "functions")
COLD, SAME, CHANGED = "cold sync", "unchanged sync", "sync with 1% changed"
SIZES = {"quick": (8, 20, 0, 5), "cpu": (100, 300, 500, 40), "gpu": (1000, 1000, 10_000, 400)}
"""Scale -> companies, questions, documents of functions, servers to sync; the largest embeds 60,000 texts."""
WHY = (
    "500 tools, no reranker, templates instead of questions by a model, MiniLM; "
    "the paper's 0.94 is Recall@10 with an LLM reranker"
)


def ways() -> dict[str, Any]:
    """Arm -> its settings. The limit on one server's share is off: one company's tools are what is asked for."""
    from ..agents.scalemcp import ScaleMCP

    alone: dict[str, Any] = {
        "name_weight": 1e-6,
        "description_weight": 1e-6,
        "parameters_weight": 0.0,
        "questions_weight": 1.0,
    }
    return {
        TDWA: ScaleMCP(fair=False),
        CONCAT: ScaleMCP("concat", fair=False),
        PLAIN: ScaleMCP("concat", questions=0, fair=False),
        QUESTIONS: ScaleMCP(fair=False, **alone),
        WORDS: ScaleMCP("bm25", fair=False),
        HYBRID: ScaleMCP("hybrid", fair=False),
    }


def run(context: Context) -> Arms:
    from ..agents.metric_tools import companies, metric_queries, metric_tools

    count, queries, functions, servers = SIZES[context.scale]
    names = companies(count, context.seed)
    arms: Arms = {}
    beds = {BEDS[0]: (metric_tools(names), metric_queries(names, queries, context.seed))}
    if functions and find_spec("bfcl_eval") is not None:
        beds[BEDS[1]] = function_bed(context.seed, functions, queries)
    for bed, (tools, asked) in beds.items():
        context.artifacts[f"{bed}: tools, questions"] = [len(tools), len(asked)]
        found = context.part(bed, lambda bed=bed, tools=tools, asked=asked: searched(bed, tools, asked, context))  # type: ignore[misc]
        for arm, values in found.items():
            arms.setdefault(arm, {}).update(values)
    arms |= context.part("syncs", lambda: syncs(servers, context))
    return arms


def searched(bed: str, tools: Sequence[ToolSpec], asked: Sequence[Asked], context: Context) -> dict[str, Any]:
    """Every retriever's scores on the same questions."""
    from ..agents.metrics import average_precision, ndcg, recall
    from ..agents.scalemcp import Retriever, minilm
    from ..agents.store import SQLiteStore

    by_server: dict[str, list[ToolSpec]] = {}
    for tool in tools:
        by_server.setdefault(tool.server, []).append(tool)
    found: dict[str, dict[str, Values]] = {}
    vectors = dict(zip([ask.query for ask in asked], minilm([ask.query for ask in asked]), strict=True))

    def embed(texts: Sequence[str]) -> Any:
        import numpy as np

        known = [vectors.get(text) for text in texts]
        return np.stack(known) if all(item is not None for item in known) else minilm(texts)  # type: ignore[arg-type]

    with SQLiteStore() as store:
        for server, specs in by_server.items():
            store.apply(server, specs)
        for arm, settings in ways().items():
            context.report(f"{arm} on {bed}", 0, 0)
            retriever = Retriever(store, settings, embed)
            rankings = [[hit.spec.key for hit in retriever.search(ask.query, 10)] for ask in asked]
            pairs = list(zip(rankings, asked, strict=True))
            values: dict[str, Values] = {
                f"{bed}: recall at {k}": [recall(keys, ask.relevant, k) for keys, ask in pairs] for k in (1, 5, 10)
            }
            values[f"{bed}: MAP at 10"] = [average_precision(keys, ask.relevant, 10) for keys, ask in pairs]
            values[f"{bed}: nDCG at 10"] = [ndcg(keys, ask.relevant, 10) for keys, ask in pairs]
            found[arm] = values
    return found


def function_bed(seed: int, count: int, questions: int) -> tuple[list[ToolSpec], list[Asked]]:
    """The distinct function documents of bfcl-eval, each a tool, and its questions with the functions that answer them.

    Only files whose answers are single functions of their own documents are read. Names are made safe; a description is
    cut as every tool's is.

    Args:
        count: documents at most: those that answer the chosen questions, then others.
        questions: at most; half as many as documents where those are few.
    """
    from ..agents.base import Key, ToolSpec, canonical_json
    from ..agents.metric_tools import Asked
    from ..agents.safety import refusal
    from ..core.rng import numpy_generator

    spec = find_spec("bfcl_eval")
    assert spec is not None and spec.origin is not None
    data = Path(spec.origin).parent / "data"
    keys: dict[str, Key] = {}
    tools: list[ToolSpec] = []
    asked: dict[str, set[Key]] = {}

    def key_of(document: dict[str, Any]) -> Key | None:
        text = canonical_json(document)
        if text not in keys:
            safe = "".join(letter if letter.isascii() and letter.isalnum() else "_" for letter in document["name"])[:40]
            tool = ToolSpec(
                "functions", f"{safe}_{len(keys)}", document.get("description", ""), document.get("parameters") or {}
            )
            if refusal(tool) is not None:
                return None
            keys[text] = tool.key
            tools.append(tool)
        return keys[text]

    for path in sorted(data.glob("BFCL_v4_*.json")):
        answers = {}
        beside = data / "possible_answer" / path.name
        if beside.is_file():
            answers = {row["id"]: row["ground_truth"] for row in _rows(beside)}
        for row in _rows(path):
            documents = row.get("function")
            if not isinstance(documents, list):
                continue
            named = {item["name"]: key_of(item) for item in documents if isinstance(item, dict) and "name" in item}
            truth, turns = answers.get(row["id"]), row.get("question")
            if not truth or not turns or len(turns) != 1 or not all(isinstance(item, dict) for item in truth):
                continue
            right = {named.get(name) for item in truth for name in item} - {None}
            query = " ".join(message["content"] for message in turns[0] if message.get("role") == "user")
            if right and query.strip():
                asked.setdefault(query, set()).update(key for key in right if key is not None)
    every = [Asked(query, frozenset(right)) for query, right in asked.items()]
    order = numpy_generator(seed, "functions").permutation(len(every))[: min(questions, count // 2)]
    chosen = [every[place] for place in order]
    needed = {key for ask in chosen for key in ask.relevant}
    others = [tool for tool in tools if tool.key not in needed]
    rest = numpy_generator(seed, "other functions").permutation(len(others))[: max(0, count - len(needed))]
    return [tool for tool in tools if tool.key in needed] + [others[place] for place in rest], chosen


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file; none where it holds something else (one of bfcl-eval's is one JSON map)."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        return []


def syncs(count: int, context: Context) -> Arms:
    """Real servers in this process: texts embedded, rows written and seconds, cold, unchanged and with 1% changed."""
    from ..agents.metric_tools import companies, metric_server
    from ..agents.scalemcp import Retriever
    from ..agents.servers import ServerEntry
    from ..agents.store import SQLiteStore
    from ..agents.sync import SyncSettings, sync
    from ..agents.transports import Limits

    names = companies(count, context.seed)
    servers = {name.lower().replace(" ", "_"): metric_server(name) for name in names}
    entries = [ServerEntry(name, target=server) for name, server in servers.items()]
    settings = SyncSettings(limits=Limits(seconds=60.0), max_loss=1.0)
    arms: Arms = {}
    with SQLiteStore() as store:
        prepare = Retriever(store, ways()[TDWA]).prepare

        def measured(arm: str) -> None:
            report = asyncio.run(sync(entries, store, prepare, settings, context.report))
            arms[arm] = {
                "rows written": float(report.writes),
                "texts embedded": float(report.made),
                "seconds of a sync": report.seconds,
            }

        measured(COLD)
        measured(SAME)
        for name in list(servers)[: max(1, count // 100)]:
            server, tool = servers[name], f"{name}_debt"
            server.remove_tool(tool)
            server.add_tool(lambda year: str(year), tool, description=f"Returns everything that {name} owes, by year.")
        measured(CHANGED)
    return arms


REPRODUCTION = Reproduction(
    name="scalemcp",
    summary="six retrievers on generated tools and on published function documents, and syncs of many servers",
    run=run,
    claims=[
        Claim(f"{BEDS[0]}: recall at 10", TDWA, "", "0.94 with a reranker", kind="value", threshold=0.94, why=WHY),
        Claim(
            f"{BEDS[0]}: nDCG at 10", TDWA, CONCAT, "concat ahead in plain vector search", kind="difference", why=WHY
        ),
        Claim(f"{BEDS[0]}: nDCG at 10", HYBRID, TDWA, "not compared", kind="difference", why=WHY),
        Claim(f"{BEDS[0]}: nDCG at 10", PLAIN, CONCAT, "not compared", kind="difference", why=WHY),
        Claim(
            f"{BEDS[1]}: nDCG at 10", TDWA, CONCAT, "concat ahead in plain vector search", kind="difference", why=WHY
        ),
        Claim(f"{BEDS[1]}: nDCG at 10", HYBRID, TDWA, "not compared", kind="difference", why=WHY),
        Claim(
            "seconds of a sync",
            SAME,
            COLD,
            "no figure",
            higher_is_better=False,
            why="servers in one process, embeddings on two cores",
        ),
    ],
    extra=("agents", "mcp"),
    seeds=1,
    scales=("quick", "cpu", "gpu"),
)
