"""What ``everytoken try`` and ``compare`` run for retrievers of tools: real servers, queries with answers."""

from __future__ import annotations

import asyncio
import time

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..decoding.trial import TrialRequest, TrialResult
from .metric_tools import Asked, companies, metric_queries, metric_server
from .metrics import average_precision, ndcg, recall
from .scalemcp import Retriever, ScaleMCP
from .servers import ServerEntry
from .store import SQLiteStore
from .sync import sync

COMPANIES, QUERIES, DEPTH = 10, 20, 10
BASELINE = "BM25"


def trace_columns(_trial: object) -> tuple[str, ...]:
    """The columns of the traces."""
    return ("score", "answer")


def trial(request: TrialRequest) -> TrialResult:
    """Syncs ten generated servers of 5 tools each twice, then asks for tools in other words; see ``decoding.trial``.

    With a prompt, the tools found for it are shown.

    Raises:
        BadInputError: a data file, or a model: neither is read.
        MissingExtraError: the extras ``agents`` or (but for BM25) ``search`` are not installed.
    """
    if request.data is not None or request.model is not None:
        raise BadInputError("Retrievers of tools read no --data and no --model.", "Give a query: --prompt '...'")
    for item in request.trials:  # bad settings are refused before anything is made
        item.factory(**item.settings)
    seed = int(request.options.get("seed", 0))
    names = companies(COMPANIES, seed)
    entries = [ServerEntry(name.lower().replace(" ", "_"), target=metric_server(name)) for name in names]
    asked = metric_queries(names, QUERIES, seed)
    result = TrialResult({}, "nDCG at 10", column="answer")
    with SQLiteStore() as store:
        first = asyncio.run(sync(entries, store, progress=request.report))
        again = asyncio.run(sync(entries, store, progress=request.report))
        result.notes.append(
            f"{len(entries)} servers: {first.writes} tools written in {first.seconds:.1f} s; "
            f"a second sync wrote {again.writes} in {again.seconds:.1f} s."
        )
        _arm(BASELINE, ScaleMCP("bm25"), store, asked, request, result)
        for item in request.trials:
            _arm(item.name, item.factory(**item.settings), store, asked, request, result)
    return result


def _arm(
    name: str, settings: ScaleMCP, store: SQLiteStore, asked: list[Asked], request: TrialRequest, result: TrialResult
) -> None:
    """One row, the tools that it found for the first query, and for the user's."""
    request.report(f"running {name}", 0, 0)
    retriever = Retriever(store, settings)
    began = time.perf_counter()
    retriever.refresh()
    made = time.perf_counter() - began
    rankings, began = [], time.perf_counter()
    for number, question in enumerate(asked):
        request.report(f"running {name}", number + 1, len(asked))
        rankings.append([hit.spec.key for hit in retriever.search(question.query, DEPTH)])
    seconds = time.perf_counter() - began
    pairs = list(zip(rankings, asked, strict=True))
    result.rows[name] = {
        **{f"recall at {k}": sum(recall(found, ask.relevant, k) for found, ask in pairs) / len(pairs) for k in (1, 5)},
        "MAP at 10": sum(average_precision(found, ask.relevant, DEPTH) for found, ask in pairs) / len(pairs),
        "nDCG at 10": sum(ndcg(found, ask.relevant, DEPTH) for found, ask in pairs) / len(pairs),
        "texts embedded": float(retriever.embedded),
        "s to embed": made,
        "ms a search": 1e3 * seconds / len(asked),
    }
    for query, relevant in [(asked[0].query, asked[0].relevant), *([(request.prompt, None)] if request.prompt else [])]:
        hits = retriever.search(query, DEPTH)
        if not hits:
            result.notes.append(f"{name}: no tool shares a word with {query!r}.")
            continue
        trace = TokenTrace([place for place, _ in enumerate(hits)], title=f"{name}: {query}", station="agents")
        trace.texts = [f"{hit.spec.name}\n" for hit in hits]
        trace.add("score", [hit.score for hit in hits])
        right = [None if relevant is None else hit.spec.key in relevant for hit in hits]
        trace.add("answer", [None if hit is None else "right" if hit else "another" for hit in right])
        result.traces.append(trace)
        result.texts[name] = ", ".join(hit.spec.name for hit in hits[: settings.k])
