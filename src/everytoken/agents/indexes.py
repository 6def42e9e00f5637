"""Indexes of vectors behind one protocol (``base.ToolStore``): exact in memory, approximate above, and Qdrant."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core.errors import BadInputError, require
from .base import Key, Record

EXACT = 100_000
"""Up to so many tools the whole matrix is multiplied: 150 MB of 384 float32, about 30 ms a search."""


class MatrixIndex:
    """Exact search by one matrix product; above ``exact`` tools by usearch's HNSW graph.

    Args:
        exact: how many tools are searched exactly.

    Raises:
        MissingExtraError: more tools than that, and usearch is not installed.
    """

    def __init__(self, exact: int = EXACT):
        self.exact = exact
        self._rows: dict[Key, Record] = {}
        self._matrix: np.ndarray | None = None
        self._graph: Any = None
        self._keys: list[Key] = []
        self._servers: np.ndarray = np.zeros(0, np.int64)
        self._numbers: dict[str, int] = {}

    def upsert(self, records: Sequence[Record]) -> None:
        self._rows |= {record.key: record for record in records}
        self._matrix = None

    def delete(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._rows.pop(key, None)
        self._matrix = None

    def snapshot(self) -> dict[Key, str]:
        return {key: record.mark for key, record in self._rows.items()}

    def search(self, vector: np.ndarray, k: int, server: str | None = None) -> list[tuple[Key, float]]:
        if k < 1:
            raise BadInputError(f"k is at least 1; got {k}.")
        self._build()
        assert self._matrix is not None
        if not self._keys or (server is not None and server not in self._numbers):
            return []
        if server is None and self._graph is not None:
            found = self._graph.search(vector.astype(np.float32), min(k, len(self._keys)))
            pairs = sorted(
                ((int(row), float(self._matrix[row] @ vector)) for row in found.keys), key=lambda pair: -pair[1]
            )
            return [(self._keys[row], score) for row, score in pairs]
        rows = np.arange(len(self._keys))
        if server is not None:
            rows = np.flatnonzero(self._servers == self._numbers[server])
        scores = self._matrix[rows] @ vector if server is not None else self._matrix @ vector
        best = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
        best = best[np.lexsort((rows[best], -scores[best]))]
        return [(self._keys[rows[place]], float(scores[place])) for place in best]

    def _build(self) -> None:
        if self._matrix is not None:
            return
        self._keys = list(self._rows)
        vectors = [record.vector for record in self._rows.values()]
        self._matrix = np.stack(vectors).astype(np.float32) if vectors else np.zeros((0, 1), np.float32)
        self._numbers = {server: place for place, server in enumerate(dict.fromkeys(key.server for key in self._keys))}
        self._servers = np.array([self._numbers[key.server] for key in self._keys], np.int64)
        self._graph = None
        if len(self._keys) > self.exact:
            require("usearch", "tokenizers", f"Searching more than {self.exact:,} tools")
            from usearch.index import Index

            self._graph = Index(ndim=self._matrix.shape[1], metric="ip", dtype="f16")
            self._graph.add(np.arange(len(self._keys)), self._matrix)


class QdrantIndex:
    """Tools in a collection of Qdrant.

    Args:
        client: a ``qdrant_client.QdrantClient``, with a server or ``":memory:"``.
        dimensions: of the vectors.
        collection: its name; made if it is missing.
    """

    def __init__(self, client: Any, dimensions: int, collection: str = "tools"):
        require("qdrant_client", None, "An index in Qdrant")
        from qdrant_client import models

        self.client, self.collection, self.models = client, collection, models
        if not client.collection_exists(collection):
            client.create_collection(
                collection, vectors_config=models.VectorParams(size=dimensions, distance=models.Distance.DOT)
            )

    def upsert(self, records: Sequence[Record]) -> None:
        points = [
            self.models.PointStruct(
                id=self._id(record.key),
                vector=record.vector.tolist(),
                payload={"server": record.key.server, "name": record.key.name, "mark": record.mark},
            )
            for record in records
        ]
        if points:
            self.client.upsert(self.collection, points, wait=True)

    def delete(self, keys: Iterable[Key]) -> None:
        points: list[Any] = [self._id(key) for key in keys]
        if points:
            self.client.delete(self.collection, self.models.PointIdsList(points=points), wait=True)

    def search(self, vector: np.ndarray, k: int, server: str | None = None) -> list[tuple[Key, float]]:
        wanted = None
        if server is not None:
            match = self.models.MatchValue(value=server)
            wanted = self.models.Filter(must=[self.models.FieldCondition(key="server", match=match)])
        found = self.client.query_points(self.collection, query=vector.tolist(), limit=k, query_filter=wanted)
        return [(Key(item.payload["server"], item.payload["name"]), float(item.score)) for item in found.points]

    def snapshot(self) -> dict[Key, str]:
        marks, offset = {}, None
        while True:
            points, offset = self.client.scroll(self.collection, limit=1000, offset=offset, with_payload=True)
            for item in points:
                marks[Key(item.payload["server"], item.payload["name"])] = item.payload["mark"]
            if offset is None:
                return marks

    @staticmethod
    def _id(key: Key) -> str:
        """A point's id: a UUID of the two columns, apart by a character that neither holds."""
        return str(uuid.uuid5(uuid.NAMESPACE_OID, f"{key.server}\x1f{key.name}"))
