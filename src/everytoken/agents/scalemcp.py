"""ScaleMCP: one tool that finds all other tools, in step with the servers that own them (arXiv 2505.06416).

Servers are the single source of truth: a sync compares SHA-256 fingerprints and writes only what has changed
(``agents.sync``, ``agents.store``). The agent has one tool, the retriever, and may use it in every turn. A tool is
embedded as the weighted average of its parts (TDWA), with unit sentence embeddings e_c::

    e_questions = normalise(mean_j E(question_j))
    v = sum_c w_c e_c      over the parts c that the tool has
    e = v / |v|            and so    q . e = (sum_c w_c q . e_c) / |v|

which is late fusion of cosines, divided by how well the parts agree. Where ``|v| < 1e-6`` the description alone counts.
Beside it stand the embedding of the joined text (``concat``), BM25 over words, and their fusion by reciprocal ranks,
``sum_i 1 / (60 + rank_i)`` (``hybrid``).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..core.errors import BadInputError, UnknownNameError, check_choices
from .base import (
    PARTS,
    Hit,
    Key,
    Record,
    ToolSpec,
    ToolStore,
    bring_up_to_date,
    parameters_text,
    questions_of,
    words_of,
)
from .safety import clean
from .store import SQLiteStore, StoredTool

if TYPE_CHECKING:
    import numpy as np

Embed = Callable[[Sequence[str]], "np.ndarray"]
"""Texts -> ``[n, dimensions]`` float32 unit vectors."""
EMBEDDER = "all-MiniLM-L6-v2"
RANKS = 60
QUERY = 2_000
"""Characters of a query that are read."""


def weighted_average(parts: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """The TDWA vector of a tool.

    Args:
        parts: unit vectors ``[dimensions]`` of the parts that the tool has.
        weights: of all parts; their scale does not matter.

    Raises:
        BadInputError: a negative weight, or no part with a weight above 0.
    """
    import numpy as np

    if any(weight < 0 or not math.isfinite(weight) for weight in weights.values()):
        raise BadInputError(f"Weights are finite and not negative; got {dict(weights)}.")
    used = [name for name in parts if weights.get(name, 0) > 0]
    if not used:
        raise BadInputError("A tool needs one part at least whose weight is above 0.")
    total = sum(weights[name] for name in used)
    vector = np.sum([weights[name] / total * parts[name] for name in used], axis=0)
    length = float(np.linalg.norm(vector))
    if length < 1e-6:  # opposite parts
        vector = parts["description"] if "description" in parts else parts[used[0]]
        length = float(np.linalg.norm(vector))
    return (vector / length).astype(np.float32)


def fused(rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
    """Reciprocal rank fusion: ids by ``sum_i 1 / (60 + rank_i)``, best first; equal ones in the order of their ids."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, item in enumerate(ranking, 1):
            scores[item] = scores.get(item, 0.0) + 1 / (RANKS + rank)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))


@dataclass
class ScaleMCP:
    """Settings of the retriever.

    Args:
        retriever: ``"tdwa"``, ``"concat"``, ``"bm25"`` or ``"hybrid"`` (TDWA and BM25 by ranks).
        name_weight, description_weight, parameters_weight, questions_weight: of TDWA.
        questions: synthetic questions a tool, 0 to 10.
        k: tools of one search.
        fair: whether at most half of a search's tools come from one server while others have some. It limits what a
            server gains that writes descriptions to match everything.

    Raises:
        BadInputError: values out of range.
    """

    retriever: str = "tdwa"
    name_weight: float = 0.2
    description_weight: float = 0.3
    parameters_weight: float = 0.2
    questions_weight: float = 0.3
    questions: int = 3
    k: int = 5
    fair: bool = True

    def __post_init__(self) -> None:
        check_choices(self, retriever=("tdwa", "concat", "bm25", "hybrid"))
        weights = list(self.weights.values())
        if any(weight < 0 or not math.isfinite(weight) for weight in weights) or sum(weights) <= 0:
            raise BadInputError(f"Weights are finite, not negative and not all 0; got {self.weights}.")
        if self.description_weight == 0 and self.name_weight == 0:
            raise BadInputError("Names or descriptions need a weight: a tool may have no parameters.")
        if not 1 <= self.k <= 100:
            raise BadInputError(f"k is 1 to 100; got {self.k}.")
        questions_of("tool", "", "", self.questions)

    @property
    def weights(self) -> dict[str, float]:
        """Part -> weight."""
        return {name: getattr(self, f"{name}_weight") for name in PARTS}

    def texts(self, spec: ToolSpec) -> dict[str, list[str]]:
        """What is embedded of a tool: part -> texts, cleaned and cut."""
        description, parameters = clean(spec.description), clean(parameters_text(spec.input_schema))
        asked = questions_of(spec.name, description, parameters, self.questions)
        found = {"name": [words_of(spec.name) or spec.name], "description": [description], "parameters": [parameters]}
        found["questions"] = asked
        if self.retriever == "concat":
            pieces = [found["name"][0], description, parameters, *asked]
            return {"joined": [". ".join(piece.rstrip(".") for piece in pieces if piece)]}
        return {name: texts for name, texts in found.items() if texts and texts[0] and self.weights[name] > 0}


def minilm(texts: Sequence[str]) -> np.ndarray:
    """The packaged all-MiniLM-L6-v2 (extra ``search``)."""
    from ..core.embedding import embed

    return embed(texts, "Finding tools by meaning")


@dataclass
class Retriever:
    """Finds tools of a store.

    Args:
        store: the truth.
        settings: how.
        embed: the sentence embedder; what it makes is kept in the store by text.
        embedder: its name, under which vectors are kept.
        index: where vectors are searched; default in memory.
    """

    store: SQLiteStore
    settings: ScaleMCP = field(default_factory=ScaleMCP)
    embed: Embed = minilm
    embedder: str = EMBEDDER
    index: ToolStore | None = None
    embedded: int = 0
    _generation: int = field(default=-1, repr=False)
    _tools: dict[int, StoredTool] = field(default_factory=dict, repr=False)
    _ids: dict[Key, int] = field(default_factory=dict, repr=False)

    def prepare(self, specs: Sequence[ToolSpec]) -> int:
        """Makes and keeps the vectors of tools that are not kept yet; returns how many texts were embedded."""
        if self.settings.retriever == "bm25":
            return 0
        return self._vectors(
            [text for spec in specs for texts in self.settings.texts(spec).values() for text in texts]
        )[1]

    def _vectors(self, texts: Sequence[str]) -> tuple[dict[str, np.ndarray], int]:
        kept = self.store.vectors(self.embedder, texts)
        missing = [text for text in dict.fromkeys(texts) if text not in kept]
        if missing:
            made = dict(zip(missing, self.embed(missing), strict=True))
            self.store.keep_vectors(self.embedder, made)
            kept |= made
            self.embedded += len(missing)
        return kept, len(missing)

    def vector(self, spec: ToolSpec, vectors: Mapping[str, np.ndarray]) -> np.ndarray:
        """A tool's unit vector from the vectors of its texts."""
        import numpy as np

        parts = {}
        for name, texts in self.settings.texts(spec).items():
            mean = np.mean([vectors[text] for text in texts], axis=0)
            parts[name] = mean / max(float(np.linalg.norm(mean)), 1e-12)
        if self.settings.retriever == "concat":
            joined: np.ndarray = parts["joined"].astype(np.float32)
            return joined
        return weighted_average(parts, self.settings.weights)

    def refresh(self) -> None:
        """Reads the store anew where it has changed."""
        generation = self.store.generation
        if generation == self._generation:
            return
        self._tools = {item.id: item for item in self.store.tools()}
        self._ids = {item.spec.key: item.id for item in self._tools.values()}
        if self.settings.retriever != "bm25":
            from .indexes import MatrixIndex

            self.index = self.index if self.index is not None else MatrixIndex()
            specs = [item.spec for item in self._tools.values()]
            every = [text for spec in specs for texts in self.settings.texts(spec).values() for text in texts]
            vectors, _ = self._vectors(every)
            records = []
            for spec in specs:
                vector = self.vector(spec, vectors)
                records.append(Record(spec.key, hashlib.sha256(vector.tobytes()).hexdigest(), vector))
            bring_up_to_date(self.index, records)
        self._generation = generation

    def search(self, query: str, k: int | None = None, server: str | None = None) -> list[Hit]:
        """The tools that fit a query, best first.

        Args:
            query: any text; the first 2,000 characters are read.
            k: how many; default the settings'.
            server: only its tools.

        Raises:
            BadInputError: an empty query, or ``k`` out of range.
            UnknownNameError: no such server.
        """
        k = self.settings.k if k is None else k
        query = clean(query, QUERY).strip()
        if not query or not 1 <= k <= 100:
            raise BadInputError(f"A search needs a query and a k of 1 to 100; got {query!r} and {k}.")
        self.refresh()
        if server is not None and all(key.server != server for key in self._ids):
            raise UnknownNameError("server of the store", server, {key.server for key in self._ids})
        fair = self.settings.fair and server is None
        depth = min(len(self._tools), max(10 * k, 100) if fair or self.settings.retriever == "hybrid" else k)
        if not depth:
            return []
        ranking = self._ranking(query, depth, server)
        if fair:
            ranking = self._shared(ranking, k)
        hits = []
        for row, score in ranking[:k]:
            item = self._tools[row]
            hits.append(Hit(item.spec, score, item.stale))
        return hits

    def _ranking(self, query: str, depth: int, server: str | None) -> list[tuple[int, float]]:
        kind = self.settings.retriever
        by_words = []
        if kind in ("bm25", "hybrid"):
            by_words = [pair for pair in self.store.matching(query, depth, server) if pair[0] in self._tools]
            if kind == "bm25":
                return by_words
        assert self.index is not None
        vector = self.embed([query])[0]  # queries are not kept: they may be private
        near = [(self._ids[key], score) for key, score in self.index.search(vector, depth, server)]
        return near if kind != "hybrid" else fused([[row for row, _ in by_words], [row for row, _ in near]])

    def _shared(self, ranking: Sequence[tuple[int, float]], k: int) -> list[tuple[int, float]]:
        """At most half of the first ``k`` from one server, while other servers have any; the rest follows."""
        limit = max(1, k // 2)
        counts: dict[str, int] = {}
        first: list[tuple[int, float]] = []
        later: list[tuple[int, float]] = []
        for pair in ranking:
            server = self._tools[pair[0]].spec.server
            counts[server] = counts.get(server, 0) + 1
            (first if counts[server] <= limit else later).append(pair)
        return first[:k] + later
