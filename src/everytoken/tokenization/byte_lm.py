"""A causal model of tokens as a model of bytes: it computes what ``exact_bytes`` defines.

The key-value cache is kept from byte to byte. It holds the settled tokens; behind them all left parts of the covers
form a small tree, which runs through the model in one forward pass a byte. Where all keys stay these are its new nodes;
where a sliding window counts every key that was read it is the whole tree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.trace import TokenTrace
from ..decoding.inputs import check_trees
from ..decoding.row_cache import RowCache, check_cached, new_cache, takes_trees
from .base import start_token
from .byte_view import ByteView, split_character

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHUNK = 256
"""Tokens of a prompt in one forward pass."""
EOS = 256
"""The 257th symbol: the end of the text, which has no bytes."""


@dataclass
class Cover:
    """A token sequence that covers a prefix.

    Attributes:
        tokens: after the settled part.
        logp: of the whole text up to its end, nats.
        beyond: its bytes behind the prefix.
    """

    tokens: tuple[int, ...]
    logp: float
    beyond: bytes


@dataclass
class _Node:
    slot: int
    logp: float
    logps: np.ndarray


class ByteLM:
    """A causal model of tokens as a model of bytes.

    Args:
        model: a transformers causal model whose cache holds keys, of full attention or of sliding windows.
        tokenizer: its fast, lossless tokenizer.
        context: token ids before the text, for example a chat template. Default: BOS, or EOS if there is no BOS.
        exact: drop covers that no text is encoded as.
        tolerance: share of the mass below which a cover's validity is not looked at.
        unit: how ``generate`` goes on unless it is told otherwise: ``"token"`` or ``"byte"``.

    After use ``forwards`` counts forward passes. One object is for one thread.

    Raises:
        BadInputError: a tokenizer that changes texts, or that has neither BOS nor EOS while no context is given.
        UnsupportedModelError: a model that cannot read the nodes of a tree in one forward (ALiBi, recurrent states, an
            attention that takes no mask).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        context: Sequence[int] | None = None,
        exact: bool = True,
        tolerance: float = 1e-6,
        unit: str = "token",
    ):
        self.check_model(model)
        self.model, self.tokenizer, self.exact, self.tolerance = model, tokenizer, exact, tolerance
        self.unit = unit
        self.view = ByteView.of(tokenizer)
        if context is None:
            context = [start_token(tokenizer)]
        self.context = [int(item) for item in context]
        if not self.context:
            raise BadInputError("The context is empty.", "A model needs at least one token, for example BOS.")
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = tokenizer.eos_token_id if ends is None else ends
        self.eos = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self.vocab = min(len(self.view.bytes), model.config.get_text_config().vocab_size)
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.forwards = 0
        self._reset()

    @staticmethod
    def check_model(model: PreTrainedModel) -> None:
        """Raises UnsupportedModelError as the constructor does; the weights may be missing (on the meta device)."""
        check_trees("ByteLM", model)
        check_cached("ByteLM", model)
        cache = new_cache(model)
        if not takes_trees(model, cache):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in cache.layers}))
            raise UnsupportedModelError(
                f"ByteLM reads the nodes of its tree in one forward, and {type(model).__name__} cannot"
                + (f" (its cache has {kinds})." if kinds else "."),
                "Use a model with attention in every layer.",
            )

    # -- the tree of left parts, on a cache ----------------------------------------------------------------------------
    def _reset(self) -> None:
        self._row = RowCache(self.model)
        # a window counts nodes of earlier forwards too: all are read anew, so that they push no text out of it
        self._anew = any(type(layer) is not DynamicLayer for layer in self._row.cache.layers)
        self._settled, self._base_logp = b"", 0.0
        self._base: list[int] = []
        self._nodes: dict[tuple[int, ...], _Node] = {}

    def _advance(self, text: bytes) -> list[tuple[int, tuple[int, ...]]]:
        """Makes all left parts of a spelled text known; returns ``(where they end, tokens after the settled part)``."""
        if not text.startswith(self._settled) or self.view.settled(text) < len(self._settled):
            self._reset()
        chain: list[int] = [] if self._base else list(self.context)
        cut = self.view.settled(text)
        if cut > len(self._settled):
            settled = self.view.encode(text[len(self._settled) : cut])
            if settled is None:
                raise BadInputError("The tokenizer changes this text.", "Normalise it first.")
            chain += settled
        lefts = []
        if any(token >= self.vocab for token in chain):
            raise BadInputError(
                "The text is encoded with a token that the model has no embedding of.", "Leave that token's text out."
            )
        for place in range(cut, len(text) + 1):
            rest = text[place:]
            if not rest or len(self.view.starting_with(rest)[0]):
                lefts += [(place, left) for left in self._beginnings(text[cut:place])]
        self._check_length(len(self._base) + len(chain))
        if chain:
            self._commit(chain)
            self._settled = text[:cut]
        missing: dict[tuple[int, ...], None] = {}
        for _, left in lefts:
            for size in range(1, len(left) + 1):
                if left[:size] not in self._nodes:
                    missing[left[:size]] = None
        self._grow(sorted(missing, key=len))
        return lefts

    def _beginnings(self, window: bytes) -> list[tuple[int, ...]]:
        """The view's, without those that hold a token beyond the model's vocabulary."""
        return [left for left in self.view.beginnings(window) if max(left, default=0) < self.vocab]

    @torch.inference_mode()
    def _commit(self, chain: list[int]) -> None:
        """Settled tokens: the tree goes, they stay."""
        if self._base:
            self._row.back()
        before = self._nodes[()].logps if self._base else None
        self._nodes = {}
        for begin in range(0, len(chain), CHUNK):  # all logits of a long prompt at once would take gigabytes
            part = chain[begin : begin + CHUNK]
            self._row.mark()
            logps = self._forward(self._row, part, list(range(len(part))), None)
            for place, token in enumerate(part):
                if len(self._base) >= len(self.context) and before is not None:
                    self._base_logp += float(before[token])
                before = logps[place]
                self._base.append(token)
        assert before is not None
        self._row.mark()
        self._nodes[()] = _Node(-1, self._base_logp, before)

    @torch.inference_mode()
    def _grow(self, paths: list[tuple[int, ...]]) -> None:
        """Adds tree nodes, parents first, in one forward pass."""
        if not paths:
            return
        read = paths
        if self._anew and len(self._nodes) > 1:
            self._row.back()
            read = sorted({*paths, *self._nodes} - {()}, key=len)
        base, past = len(self._base), self._row.length
        seen = np.zeros((len(read), past + len(read)), bool)
        seen[:, :base] = True
        slots = {path: past + place for place, path in enumerate(read)}
        for place, path in enumerate(read):
            for size in range(1, len(path) + 1):
                part = path[:size]
                seen[place, slots[part] if part in slots else self._nodes[part].slot] = True
        tokens, depths = [path[-1] for path in read], [len(path) - 1 for path in read]
        self._check_length(base + max(depths) + 1)
        logps = self._forward(self._row, tokens, depths, torch.from_numpy(seen))
        for place, path in enumerate(read):
            above = self._nodes[path[:-1]]
            self._nodes[path] = _Node(slots[path], above.logp + float(above.logps[path[-1]]), logps[place])

    def _forward(self, row: RowCache, tokens: list[int], depths: list[int], seen: torch.Tensor | None) -> np.ndarray:
        """``[k, V]`` log-probabilities after each token; ``depths`` count from the row's mark."""
        output = row.read_tree(tokens, depths, seen)
        self.forwards += 1
        return torch.log_softmax(output["logits"][0, :, : self.vocab].float(), -1).cpu().numpy()

    def _check_length(self, count: int) -> None:
        if count > self._longest:
            raise BadInputError(
                f"The text is longer than the model's context of {self._longest:,} tokens.", "Shorten it."
            )

    # -- probabilities -------------------------------------------------------------------------------------------------
    def _masses(
        self, text: bytes, strictly: bool
    ) -> list[tuple[tuple[int, ...], np.ndarray, np.ndarray, np.ndarray, int]]:
        """For every left part: the tokens that start with the rest, their next bytes and log-masses, and its end.

        Args:
            strictly: only tokens that go on behind the text.
        """
        found = []
        for place, left in self._advance(text):
            if place == len(text) and not strictly:
                continue
            ids, after = self.view.starting_with(text[place:])
            kept = ids < self.vocab
            if strictly:
                kept &= after >= 0
            ids, after = ids[kept], after[kept]
            node = self._nodes[left]
            found.append((left, ids, after, node.logp + node.logps[ids].astype(np.float64), place))
        if not self.exact:
            return found
        highest = [float(masses.max()) for *_, masses, _ in found if len(masses)]
        top = max(highest, default=-math.inf)
        if top == -math.inf:
            return found
        total = top + math.log(sum(float(np.exp(masses - top).sum()) for *_, masses, _ in found))
        least = total + math.log(self.tolerance) if self.tolerance > 0 else -math.inf
        for left, ids, _, masses, _ in found:
            for which in np.flatnonzero(masses > least).tolist():
                if not self.view.begins((*left, int(ids[which]))):
                    masses[which] = -math.inf
        return found

    def _end_masses(self, text: bytes) -> list[float]:
        """Log-mass of the text ending here, for each encoding of it (after ``_advance``)."""
        window = text[len(self._settled) :]
        lefts = self._beginnings(window)
        if self.exact and window:  # what ends is encoded in one way only
            whole = split_character(window)
            own = self.view.encode(window) if whole is not None and not whole[1] else None
            lefts = [left for left in lefts if own is not None and left == tuple(own)]
        if text == self.view.lead:  # no text: no token, not even one for the space
            lefts = [()]
        nodes = [self._nodes[left] for left in lefts]
        return [node.logp + float(node.logps[item]) for node in nodes for item in self.eos if item < self.vocab]

    def next_byte_logprobs(self, prefix: str | bytes) -> np.ndarray:
        """``[257]`` natural log-probabilities of the next byte; the last is the end of the text.

        Raises:
            BadInputError: bytes that are no UTF-8, or a prefix that has no cover at all.
        """
        text = self.view.spelled(prefix)
        found = self._masses(text, True)
        ends = self._end_masses(text)
        top = max([float(logs.max()) for *_, logs, _ in found if len(logs)] + ends, default=-math.inf)
        if top == -math.inf:
            raise BadInputError("No token sequence covers this prefix.", "Does the tokenizer lack some bytes?")
        masses = np.zeros(257)
        for _, _, after, logs, _ in found:
            masses[:256] += np.bincount(after, np.exp(logs - top), 256)
        masses[EOS] = sum(math.exp(logp - top) for logp in ends)
        _, tail = split_character(text) or (b"", b"")
        for byte in range(256):  # what leaks below the tolerance must not end in bytes that are no text
            if split_character(tail + bytes([byte])) is None:
                masses[byte] = 0.0
        with np.errstate(divide="ignore"):
            return np.log(masses / masses.sum())

    def covers(self, prefix: str | bytes) -> list[Cover]:
        """All covers of a prefix with mass, the likeliest first."""
        text = self.view.spelled(prefix)
        result = []
        for left, ids, _, logs, place in self._masses(text, False):
            for which in np.flatnonzero(np.isfinite(logs)):
                token = int(ids[which])
                beyond = (self.view.bytes[token] or b"")[len(text) - place :]
                result.append(Cover((*left, token), float(logs[which]), beyond))
        return sorted(result, key=lambda cover: -cover.logp)

    def logprob(self, text: str | bytes, ended: bool = False) -> float:
        """Log-probability (nats) that the model's text starts with ``text``, or (``ended``) that it is just that."""
        data = self.view.spelled(text)
        if ended:
            self._advance(data)
            return float(np.logaddexp.reduce(self._end_masses(data) or [-math.inf]))
        if data == self.view.lead:
            return 0.0
        return float(np.logaddexp.reduce(np.concatenate([logs for *_, logs, _ in self._masses(data, False)])))

    # -- generation ----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prefix: str | bytes,
        max_new_bytes: int = 64,
        do_sample: bool = False,
        temperature: float = 1.0,
        seed: int | None = None,
        unit: str | None = None,
    ) -> bytes:
        """New bytes after a prefix.

        Args:
            unit: ``"byte"`` chooses byte by byte, one forward pass each. ``"token"`` chooses a cover of the prefix and
                goes on with plain tokens, one forward pass each. Default: the unit of this object. At temperature 1
                both sample the same distribution of texts.
            temperature: of the unit's distribution.

        Raises:
            BadInputError: an unknown unit, or a temperature that is not positive.
        """
        unit = self.unit if unit is None else unit
        if unit not in ("byte", "token"):
            raise BadInputError(f"unit is 'byte' or 'token'; got {unit!r}.")
        if not temperature > 0:
            raise BadInputError(f"temperature must be above 0; got {temperature}.", "do_sample=False is greedy.")
        rng = np.random.default_rng(seed)
        start = self.view.spelled(prefix)[len(self.view.lead) :]
        if unit == "byte":
            return generate_bytes(self, start, max_new_bytes, do_sample, temperature, rng)
        covers = self.covers(start) if start else []
        tokens, new = list(self.context), b""
        if covers:
            logs = np.array([cover.logp for cover in covers])
            cover = covers[choose(logs, do_sample, temperature, rng)]
            tokens, new = [*self._base, *cover.tokens], cover.beyond
        return self._plain(tokens, new, max_new_bytes, do_sample, temperature, rng)

    @torch.inference_mode()
    def _plain(
        self, tokens: list[int], new: bytes, size: int, do_sample: bool, temperature: float, rng: np.random.Generator
    ) -> bytes:
        row, fresh, position, ends = RowCache(self.model), tokens, 0, set(self.eos)
        while len(new) < size and position + len(fresh) <= self._longest:
            row.mark()
            logps = self._forward(row, fresh, list(range(len(fresh))), None)[-1]
            position += len(fresh)
            token = choose(logps.astype(np.float64), do_sample, temperature, rng)
            if token in ends:
                break
            piece = self.view.bytes[token] or b""
            new += piece if new or position > len(self.context) else piece.removeprefix(self.view.lead)
            fresh = [token]
        return new[:size]

    def trace(self, prefix: str | bytes, top: int = 12) -> TokenTrace:
        """The likeliest covers of a prefix: their last tokens, with probabilities given the prefix."""
        covers = self.covers(prefix)
        total = np.logaddexp.reduce([cover.logp for cover in covers])
        shown = covers[:top]
        trace = TokenTrace([cover.tokens[-1] for cover in shown], title="covers", station="tokenization")
        trace.add("probability", [math.exp(cover.logp - total) for cover in shown])
        trace.add("beyond", [cover.beyond.decode("utf-8", "replace") for cover in shown])
        trace.add("tokens in the window", [len(cover.tokens) for cover in shown])
        return trace.with_text(self.tokenizer)


def choose(logps: np.ndarray, do_sample: bool, temperature: float, rng: np.random.Generator) -> int:
    if not do_sample:
        return int(np.argmax(logps))
    scaled = logps / temperature
    probs = np.exp(scaled - scaled.max())
    return int(rng.choice(len(probs), p=probs / probs.sum()))


class NextByte(Protocol):
    """Anything that tells how the next byte is distributed."""

    def next_byte_logprobs(self, prefix: str | bytes) -> np.ndarray: ...


def generate_bytes(
    source: NextByte, start: bytes, size: int, do_sample: bool, temperature: float, rng: np.random.Generator
) -> bytes:
    """Byte by byte from anything with ``next_byte_logprobs``."""
    new = b""
    while len(new) < size:
        byte = choose(source.next_byte_logprobs(start + new), do_sample, temperature, rng)
        if byte == EOS:
            break
        new += bytes([byte])
    return new
