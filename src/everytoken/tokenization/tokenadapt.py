"""TokenAdapt: another tokenizer for a trained model (arXiv 2505.09738).

Tokens that both vocabularies have (by their bytes) keep their embeddings. Special tokens are matched by role, EOS first
where one token has several, then by name. Every other new token t gets a mix of two estimates. The *local* one is made
of its pieces p_1..p_n under the old tokenizer, weighted by meaning and length::

    c_i = cos(ext(t), ext(p_i)),   l_i = len(p_i) / len(t)
    w = softmax(((softmax(c) + l) / 2) / temperature)
    e_local = sum_i w_i E_old[p_i]

The *global* one is made of its nearest old tokens j_1..j_k, by the cosine s of an external text embedding ``ext``::

    w = softmax(s / temperature), those with s < threshold dropped, renormalised
    e_global = sum_j w_j E_old[j]

    e_new = (1 - global_weight) e_local + global_weight e_global

If one estimate is missing, the other is taken. If both are missing, the row is drawn from N(mean(E_old), std(E_old)). A
separate output matrix and an output bias are mixed with the same weights. Token ids in the configurations (stop tokens,
suppressed and forced ones) follow. The baselines by ``strategy`` are ``"retok"`` (plain average of
the pieces), ``"mean"`` (the mean of E_old) and ``"random"``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ..core.errors import BadInputError
from ..core.progress import Report, silent, within
from ..core.trace import TokenTrace
from .base import own_ids, token_bytes
from .byte_view import ByteView
from .carry import ROLES, MovedIds
from .embedding import matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Embedder = Callable[[Sequence[str]], np.ndarray]
STRATEGIES = ("tokenadapt", "retok", "mean", "random")
CHUNK = 4096


@dataclass
class Mixture:
    """Where the new rows come from.

    Attributes:
        copied: ``[V_new]`` int64, the old row to copy, or -1.
        rows: ``[N]`` the other new ids.
        sources, weights: ``[N, S]`` old ids (0 where unused) and their weights; rows of zeros are drawn at random.
    """

    copied: np.ndarray
    rows: np.ndarray
    sources: np.ndarray
    weights: np.ndarray


@dataclass
class TokenAdapt:
    """Puts a new tokenizer under a model.

    Args:
        temperature: of both softmaxes; +1e-5.
        top_k: nearest old tokens.
        global_weight: share of the global estimate.
        threshold: least cosine of a neighbour.
        strategy: ``"tokenadapt"``, or a baseline: ``"retok"``, ``"mean"``, ``"random"``.
        pad_to_multiple_of: the new vocabulary is padded to it.
        seed: for what is drawn at random.
        embedder: ``texts -> [n, d]``; default the packaged MiniLM (extra ``search``).

    After ``transplant``, ``mixture`` tells what each new row was made of.

    Raises:
        BadInputError: a setting out of its range.
    """

    trace_columns: ClassVar[tuple[str, ...]] = ("origin", "made of", "largest weight")
    temperature: float = 0.3
    top_k: int = 3
    global_weight: float = 0.3
    threshold: float = 0.0
    strategy: str = "tokenadapt"
    pad_to_multiple_of: int = 128
    seed: int = 0
    embedder: Embedder | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise BadInputError(f"strategy is one of {', '.join(STRATEGIES)}; got {self.strategy!r}.")
        if not 0 <= self.global_weight <= 1:
            raise BadInputError(f"global_weight is a share, 0 to 1; got {self.global_weight}.")
        if not self.temperature >= 0 or self.top_k < 1 or self.pad_to_multiple_of < 1:
            raise BadInputError(
                f"temperature must not be negative, top_k and pad_to_multiple_of at least 1; got {self.temperature}, "
                f"{self.top_k}, {self.pad_to_multiple_of}."
            )
        self.mixture: Mixture | None = None

    # -- what each new token is made of --------------------------------------------------------------------------------
    def mix(
        self,
        old_tokenizer: PreTrainedTokenizerBase,
        new_tokenizer: PreTrainedTokenizerBase,
        rows: int | None = None,
        report: Report = silent,
    ) -> Mixture:
        """Copies and weights, from the tokenizers alone.

        Args:
            rows: embeddings of the model; tokens beyond them have none, and nothing is made of them.
            report: progress of the text embeddings.

        Raises:
            BadInputError: tokenizers that cannot be spelt.
        """
        view = ByteView.of(old_tokenizer, lossless=False)
        old, new = view.bytes, token_bytes(new_tokenizer)
        rows = len(old) if rows is None else rows
        by_bytes = {data: index for data, index in own_ids(old_tokenizer).items() if index < rows}
        copied = np.full(len(new), -1, np.int64)
        for index, data in enumerate(new):
            if data and data in by_bytes:
                copied[index] = by_bytes[data]
        self._special(old_tokenizer, new_tokenizer, rows, copied)
        made = np.array([i for i, data in enumerate(new) if copied[i] < 0 and data], np.int64)
        tokens = [new[i] or b"" for i in made.tolist()]
        if self.strategy in ("mean", "random") or not len(made):
            width = np.zeros((len(made), 1))
            return Mixture(copied, made, width.astype(np.int64), width)
        pieces = [pieces_of(view, data, by_bytes) for data in tokens]
        if self.strategy == "retok":
            sources, weights = _ragged(pieces, [[1 / len(item)] * len(item) if item else [] for item in pieces])
            return Mixture(copied, made, sources, weights)
        named = sorted(by_bytes.values())
        unique = [data.decode("utf-8", "replace") for data in tokens]
        vectors = self._embed([(old[i] or b"").decode("utf-8", "replace") for i in named], unique, report)
        known, fresh = np.zeros((len(old), vectors.shape[1]), np.float32), vectors[len(named) :]
        known[named] = vectors[: len(named)]
        local = _ragged(
            pieces,
            [self._local(fresh[n], known[p], tokens[n], [old[i] or b"" for i in p]) for n, p in enumerate(pieces)],
        )
        near, cosines = nearest(fresh, known[named], self.top_k)
        share = self._global(cosines)
        g = self.global_weight
        has_local, has_global = local[1].sum(1) > 0, share.sum(1) > 0
        weights = np.concatenate(
            [
                local[1] * np.where(has_global, 1 - g, 1.0)[:, None],
                share * np.where(has_local, g, 1.0)[:, None],
            ],
            1,
        )
        sources = np.concatenate([local[0], np.array(named, np.int64)[near]], 1)
        return Mixture(copied, made, sources, weights)

    def _special(
        self,
        old_tokenizer: PreTrainedTokenizerBase,
        new_tokenizer: PreTrainedTokenizerBase,
        rows: int,
        copied: np.ndarray,
    ) -> None:
        """Special tokens by role, then by name; and tokens of one name and the same bytes (of byte fallback)."""
        old, new = token_bytes(old_tokenizer), token_bytes(new_tokenizer)
        taken: set[int] = set()
        for role in ROLES:
            theirs, ours = getattr(new_tokenizer, role, None), getattr(old_tokenizer, role, None)
            if theirs is None or ours is None or theirs >= len(new) or ours >= rows or theirs in taken:
                continue
            copied[theirs] = ours
            taken.add(theirs)
        names = old_tokenizer.get_vocab()
        for name, index in new_tokenizer.get_vocab().items():
            if index >= len(new) or index in taken:
                continue
            known = names.get(name, rows)
            if known < rows and old[known] == new[index]:
                copied[index] = known

    def _embed(self, known: list[str], fresh: list[str], report: Report) -> np.ndarray:
        """Vectors of the old tokens' texts, kept for the next tokenizer of that model, then of the new ones'."""
        stage = "embedding the texts of both vocabularies' tokens"
        if self.embedder is not None:
            texts = known + fresh
            report(stage, 0, len(texts))
            vectors = np.asarray(self.embedder(texts), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(texts):
                raise BadInputError(
                    f"The embedder must return one vector a text; got {vectors.shape} for {len(texts)}."
                )
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        from ..core.embedding import embed, embed_once

        total = len(known) + len(fresh)
        first = embed_once(known, "TokenAdapt", within(report, stage, 0, total))
        return np.concatenate([first, embed(fresh, "TokenAdapt", within(report, stage, len(known), total))])

    def _local(self, vector: np.ndarray, pieces: np.ndarray, token: bytes, parts: list[bytes]) -> list[float]:
        if not parts:
            return []
        meaning = _softmax(pieces @ vector)
        length = np.array([_characters(part) for part in parts]) / max(_characters(token), 1)
        return _softmax((meaning + length) / 2 / (self.temperature + 1e-5)).tolist()

    def _global(self, cosines: np.ndarray) -> np.ndarray:
        weights = _softmax(cosines / (self.temperature + 1e-5))
        weights = np.where(cosines < self.threshold, 0.0, weights)
        total = weights.sum(1, keepdims=True)
        return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)

    # -- into the model ------------------------------------------------------------------------------------------------
    def transplant(
        self,
        model: PreTrainedModel,
        old_tokenizer: PreTrainedTokenizerBase,
        new_tokenizer: PreTrainedTokenizerBase,
        report: Report = silent,
    ) -> PreTrainedModel:
        """A copy of the model for the new tokenizer. Save both with ``save_pretrained``; plain transformers loads them.

        Args:
            report: progress of the text embeddings.

        Raises:
            UnsupportedModelError: a model without token embeddings.
            BadInputError: the old tokenizer has more tokens than the model (added ones may lack a row), or the
                configurations hold a token that the new tokenizer cannot write.
        """
        _, weight, _ = matrices(model)
        tokens = token_bytes(old_tokenizer)
        added = set(old_tokenizer.get_added_vocab().values())
        if any(tokens[index] is not None and index not in added for index in range(len(weight), len(tokens))):
            raise BadInputError(
                f"The old tokenizer has {len(tokens)} tokens but the model {len(weight)} embeddings.",
                "Pass the tokenizer that the model was trained with.",
            )
        moved = MovedIds(old_tokenizer, new_tokenizer)
        configs = [model.config, model.config.get_text_config(), getattr(model, "generation_config", None)]
        changes = [{} if config is None else moved.changes(config) for config in configs]
        mixture = self.mixture = self.mix(old_tokenizer, new_tokenizer, len(weight), report)
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is weight
        fresh = copy.deepcopy(model)
        size = -(-len(mixture.copied) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        with torch.no_grad():
            rows = self._rows(weight, mixture, size)
            outputs = None if head is None or tied else self._rows(head.weight, mixture, size)
            bias = getattr(head, "bias", None)
            biases = None if bias is None else self._rows(bias[:, None], mixture, size)[:, 0]
            fresh.resize_token_embeddings(size, mean_resizing=False)
            source, target = fresh.get_input_embeddings(), fresh.get_output_embeddings()
            source.weight.copy_(rows)
            if outputs is not None:
                target.weight.copy_(outputs)
            if biases is not None:
                target.bias.copy_(biases)
            if tied:
                fresh.tie_weights()
        if getattr(source, "padding_idx", None) is not None:  # the row that learns nothing
            source.padding_idx = new_tokenizer.pad_token_id
        configs = [fresh.config, fresh.config.get_text_config(), getattr(fresh, "generation_config", None)]
        for config, change in zip(configs, changes, strict=True):
            for name, value in change.items():
                setattr(config, name, value)
        return fresh

    def summary(self) -> str:
        """How many rows the last transplant copied and made.

        Raises:
            BadInputError: there was none.
        """
        if self.mixture is None:
            raise BadInputError("Nothing was transplanted yet.", "Call transplant(model, old, new) first.")
        return f"{int((self.mixture.copied >= 0).sum()):,} rows copied, {len(self.mixture.rows):,} made."

    def _rows(self, matrix: torch.Tensor, mixture: Mixture, size: int) -> torch.Tensor:
        """``[size, d]``: copied, mixed and drawn rows; padding rows are the mean."""
        old = matrix.detach().float()
        mean, std = old.mean(0), old.std(0)
        new = mean.repeat(size, 1)
        kept = torch.from_numpy(np.flatnonzero(mixture.copied >= 0))
        for begin in range(0, len(mixture.rows), CHUNK):
            part = slice(begin, begin + CHUNK)
            weights = torch.from_numpy(mixture.weights[part]).float()
            mixed = torch.einsum("ns,nsd->nd", weights, old[torch.from_numpy(mixture.sources[part])])
            missing = weights.sum(1) == 0
            if self.strategy != "mean":
                noise = torch.randn(len(mixed), len(mean), generator=torch.Generator().manual_seed(self.seed + begin))
                mixed[missing] = (mean + std * noise)[missing]
            else:
                mixed[missing] = mean
            new[torch.from_numpy(mixture.rows[part])] = mixed
        new = new.to(matrix.dtype)
        new[kept] = matrix.detach()[torch.from_numpy(mixture.copied)[kept]]
        return new

    def trace(
        self, old_tokenizer: PreTrainedTokenizerBase, new_tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
    ) -> TokenTrace:
        """What the tokens of a text are made of (after ``transplant`` or with ``mixture`` set)."""
        if self.mixture is None:
            self.mixture = self.mix(old_tokenizer, new_tokenizer)
        mixture, place = self.mixture, {int(row): n for n, row in enumerate(self.mixture.rows)}
        names = token_bytes(old_tokenizer)
        origin, made, top = [], [], []
        for item in ids:
            if mixture.copied[item] >= 0 or item not in place:
                origin.append("shared" if mixture.copied[item] >= 0 else "mean")
                made.append("")
                top.append(1.0)
                continue
            weights, sources = mixture.weights[place[item]], mixture.sources[place[item]]
            order = np.argsort(-weights)[:4]
            origin.append("mixed" if weights.sum() > 0 else "random")
            parts = [
                f"{(names[sources[k]] or b'').decode('utf-8', 'replace')!r} {weights[k]:.2f}"
                for k in order
                if weights[k] > 0
            ]
            made.append(", ".join(parts))
            top.append(float(weights.max()))
        trace = TokenTrace(list(ids), title="tokenadapt", station="tokenization").add("origin", origin)
        return trace.add("made of", made).add("largest weight", top).with_text(new_tokenizer)


def pieces_of(view: ByteView, data: bytes, by_bytes: dict[bytes, int]) -> list[int]:
    """The old tokens that spell a new one: as the old tokenizer cuts it, or else the longest that fit.

    A tokenizer that changes texts (lower case) cuts what it makes of the new token.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if text:
        inside = view.lead if not data.startswith(view.lead) else b""
        ids = view.encode(inside + data)
        if ids is not None and inside and view.bytes[ids[0]] == inside:
            ids = ids[1:]
        if ids is not None and view.spell(ids) == data and all(view.bytes[item] in by_bytes for item in ids):
            return ids
    pieces, place = [], 0
    while place < len(data):
        for size in range(len(data) - place, 0, -1):
            if data[place : place + size] in by_bytes:
                pieces.append(by_bytes[data[place : place + size]])
                break
        else:
            return [] if view.lossless else [item for item in view.cut(text) if view.bytes[item] in by_bytes]
        place += size
    return pieces


def nearest(queries: np.ndarray, keys: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """``[N, k]`` places and inner products of the largest, exactly, in chunks."""
    k = min(top_k, len(keys))
    table = torch.from_numpy(np.ascontiguousarray(keys)).T
    places, values = [np.zeros((0, k), np.int64)], [np.zeros((0, k), np.float32)]
    for begin in range(0, len(queries), 1024):
        found = (torch.from_numpy(queries[begin : begin + 1024]) @ table).topk(k, -1)
        places.append(found.indices.numpy())
        values.append(found.values.numpy())
    return np.concatenate(places), np.concatenate(values)


def _ragged(sources: list[list[int]], weights: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    width = max((len(item) for item in sources), default=0) or 1
    table, shares = np.zeros((len(sources), width), np.int64), np.zeros((len(sources), width))
    for row, (ids, values) in enumerate(zip(sources, weights, strict=True)):
        table[row, : len(ids)], shares[row, : len(values)] = ids, values
    return table, shares


def _softmax(values: np.ndarray) -> np.ndarray:
    scaled = np.exp(values - values.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def _characters(data: bytes) -> int:
    return len(data.decode("utf-8", "replace"))
