"""Generation over a vocabulary far larger than the model's own, by nearest neighbours (arXiv 2411.18553, section 5).

Any number of new tokens join the model's own. An ``Embedder`` makes their input and output embeddings from their
pieces. A softmax over all tokens would cost as much as the vocabulary is large. Instead an HNSW index over the output
embeddings finds the ``top_k`` tokens whose inner product with the last hidden state is largest::

    logits(t) = h . E_out(t)  for t in top_k(h),      next ~ softmax over those,      next input = E_in(next)

Largest inner products are nearest neighbours once one more coordinate makes all keys equally long: ``(q, 0)`` and ``(e,
sqrt(max|e|^2 - |e|^2))``. Hidden states lie in a narrow cone far from all keys, where graphs search badly. So both
sides are first turned by the second moment C of a sample of states: ``q = C^(-1/2) h``, ``e = C^(1/2) E_out``. Inner
products stay as they are, and two tokens are now near each other if their logits are alike.

::

    tokens = DynamicTokenizer(tokenizer).vocabulary(corpus, 100_000)
    decoder = LargeVocabulary(tokens, embedder).build(model)
    model.generate(**inputs, max_new_tokens=64, custom_generate=decoder)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError, UnsupportedModelError, check_choices, require
from ..core.progress import Report, silent
from ..decoding.base import Decoder, Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.row import DecodingRow
from .embedding import Embedder

CHUNK = 4096
INDEXED = 16384
"""Tokens that join an index between two reports of progress."""
SAMPLE = 2048
"""Tokens to fit the index to, where no sample is given."""
SHRINKAGE = 0.01
WARPERS = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "LogitNormalization",
    "InfNanRemoveLogitsProcessor",
}
"""Processors that look at scores alone: all that make sense on ``top_k`` tokens of another vocabulary."""


@dataclass
class LargeVocabularyStats(DecodingStats):
    """Counters of a call.

    Attributes:
        chosen: each row's tokens, as pieces.
    """

    chosen: list[list[tuple[int, ...]]] = field(default_factory=list)


@dataclass
class LargeVocabulary(Decoder):
    """A decoder over the model's tokens and many more; a ``custom_generate`` for transformers.

    Args:
        tokens: the new tokens, each as its pieces (ids of the model's own).
        embedder: makes their embeddings.
        top_k: tokens looked up in each step.
        index: ``"hnsw"``, or ``"exact"`` (every inner product).
        connectivity, expansion_add, expansion_search: of the HNSW graph: links a node, and candidates while building
            and searching.

    Text is returned in the model's own tokens; rows are decoded one after the other. After a call ``steps`` counts
    forward passes and ``chosen`` holds each row's tokens (as pieces). The trace has ``pieces in the token``.

    Raises:
        BadInputError: a new token without pieces, or a setting out of its range.
    """

    tokens: Sequence[tuple[int, ...]] = field(repr=False)
    embedder: Embedder = field(repr=False)
    top_k: int = 32
    index: str = "hnsw"
    connectivity: int = 16
    expansion_add: int = 128
    expansion_search: int = 320
    stats_type: ClassVar[type[DecodingStats]] = LargeVocabularyStats
    trace_columns: ClassVar[tuple[str, ...]] = ("pieces in the token",)
    colour: ClassVar[str] = "pieces in the token"
    station: ClassVar[str] = "tokenization"
    continues: ClassVar[bool] = False
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choices(self, index=("hnsw", "exact"))
        if self.top_k < 1:
            raise BadInputError(f"top_k is at least 1; got {self.top_k}.")
        if any(not item for item in self.tokens):
            raise BadInputError("A new token has no pieces.", "DynamicTokenizer.vocabulary makes tokens with pieces.")
        self._model: PreTrainedModel | None = None

    @property
    def stats(self) -> LargeVocabularyStats:
        return cast(LargeVocabularyStats, super().stats)

    @property
    def steps(self) -> int:
        """Forward passes of the last call."""
        return self.stats.target_forwards

    @property
    def chosen(self) -> list[list[tuple[int, ...]]]:
        """Each row's tokens of the last call, as pieces."""
        return self.stats.chosen

    @torch.no_grad()
    def build(
        self, model: PreTrainedModel, sample: Sequence[Sequence[int]] | None = None, report: Report = silent
    ) -> LargeVocabulary:
        """Makes all embeddings and the index; returns itself.

        Args:
            sample: texts in the model's tokens, for the hidden states that the index is fitted to (about 2,000 tokens
                are enough); default: the new tokens' pieces in a row, which finds less.
            report: progress, in tokens.

        Raises:
            UnsupportedModelError: an output layer with a bias, or soft-capped logits.
            MissingExtraError: usearch is not installed (not needed for ``index="exact"``).
        """
        head = model.get_output_embeddings()
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if head is None or getattr(head, "bias", None) is not None or capped:
            raise UnsupportedModelError(
                f"{type(model).__name__}'s logits are not inner products with its output embeddings.",
                "An output layer without bias and without soft-capping is needed.",
            )
        if self.index == "hnsw":
            require("usearch", "tokenizers", "An HNSW index")
        self._model, self._size = model, len(head.weight)
        first, second = [], [head.weight.detach()]
        for begin in range(0, len(self.tokens), CHUNK):
            report("embedding the new tokens", begin, len(self.tokens))
            inputs, outputs = self.embedder.embed(self.tokens[begin : begin + CHUNK])
            first.append(inputs)
            second.append(outputs.to(head.weight))
        self._inputs = torch.cat(first) if first else head.weight.new_zeros(0, head.weight.shape[1])
        self._outputs = torch.cat(second)
        if self.index == "hnsw":
            from usearch.index import Index

            turn, self._turn = self._turns(model, sample)
            keys = (self._outputs.double().cpu() @ turn).float().numpy()
            # a graph each: the model's own tokens and the new ones lie in clusters with few links between them
            self._graphs = []
            for begin, end in ((0, self._size), (self._size, len(keys))):
                if end > begin:
                    part = keys[begin:end]
                    norms = (part**2).sum(1)
                    extra = np.sqrt(np.maximum(norms.max() - norms, 0))
                    graph = Index(
                        ndim=keys.shape[1] + 1,
                        metric="l2sq",
                        dtype="f32",
                        connectivity=self.connectivity,
                        expansion_add=self.expansion_add,
                        expansion_search=self.expansion_search,
                    )
                    vectors = np.concatenate([part, extra[:, None]], 1)
                    for place in range(begin, end, INDEXED):
                        report("building the index", place, len(keys))
                        numbers = np.arange(place, min(place + INDEXED, end))
                        graph.add(numbers, vectors[numbers - begin])
                    self._graphs.append(graph)
        return self

    def _turns(
        self, model: PreTrainedModel, sample: Sequence[Sequence[int]] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``C^(1/2)`` and ``C^(-1/2)`` of a sample's hidden states, ``[d, d]`` each."""
        if sample is None:
            flat = [piece for item in self.tokens[:SAMPLE] for piece in item][:SAMPLE] or list(
                range(min(self._size, 256))
            )
            sample = [flat[begin : begin + 256] for begin in range(0, len(flat), 256)]
        states = [
            model.base_model(torch.tensor([list(row)], device=model.device)).last_hidden_state[0, 1:] for row in sample
        ]
        hidden = torch.cat(states).double().cpu()
        moment = hidden.T @ hidden / max(1, len(hidden))
        moment += SHRINKAGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
        values, vectors = torch.linalg.eigh(moment)
        roots = values.clamp(min=1e-12).sqrt()
        return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T

    def __len__(self) -> int:
        """Tokens in all."""
        return len(self._outputs)

    def pieces(self, number: int) -> tuple[int, ...]:
        """A token's pieces: itself for the model's own."""
        return (number,) if number < self._size else self.tokens[number - self._size]

    @torch.no_grad()
    def nearest(self, hidden: torch.Tensor, exact: bool | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of largest logits, the largest first.

        Args:
            hidden: hidden states ``[N, d]``.
            exact: compare with every token; default as ``index`` says.

        Returns:
            Numbers and logits, ``[N, k]`` each.
        """
        exact = self.index == "exact" if exact is None else exact
        k = min(self.top_k, len(self))
        if exact:
            found = (hidden.to(self._outputs) @ self._outputs.T).float().topk(k, -1)
            return found.indices, found.values
        query = (hidden.double().cpu() @ self._turn).float().numpy()
        query = np.ascontiguousarray(np.concatenate([query, np.zeros((len(query), 1), np.float32)], 1))
        found_keys = [
            graph.search(query, min(k, len(graph))).keys.reshape(len(query), -1).astype(np.int64)
            for graph in self._graphs
        ]
        keys = np.concatenate(found_keys, 1)
        numbers = torch.from_numpy(keys).to(self._outputs.device)
        logits = (self._outputs[numbers].float() @ hidden.float().to(self._outputs.device)[..., None])[..., 0]
        order = logits.argsort(-1, descending=True)[:, :k]
        return numbers.gather(-1, order), logits.gather(-1, order)

    def recall(self, hidden: torch.Tensor, top: int = 1) -> float:
        """Share of the exact ``top`` tokens that the index finds, over hidden states ``[N, d]``."""
        true, found = self.nearest(hidden, True)[0][:, :top], self.nearest(hidden)[0]
        return float((true[:, :, None] == found[:, None, :]).any(-1).float().mean())

    def check_call(self, call: DecodingCall[LargeVocabularyStats]) -> None:
        """Refuses a call that the index cannot serve.

        Raises:
            BadInputError: the index was built for another model; a processor looks at token ids; or scores of the
                model's own vocabulary are asked for.
        """
        if self._model is not call.model:
            raise BadInputError("The index was built for another model, or not at all.", "Call build(model) first.")
        odd = [type(item).__name__ for item in call.processors if type(item).__name__ not in WARPERS]
        if odd:
            raise BadInputError(
                f"{', '.join(odd)} works on the model's own token ids, not on a large vocabulary.", "Leave it out."
            )
        if call.wants:
            raise BadInputError(
                "LargeVocabulary scores top_k tokens of another vocabulary; "
                f"{' and '.join(call.wants)} cannot be given.",
                "Leave it out.",
            )

    def decode_row(self, call: DecodingCall[LargeVocabularyStats], row: DecodingRow) -> None:
        """A forward, the nearest tokens, one of them, and its embedding as the next input."""
        inputs = {"input_ids": row.ids[:, len(row.padding) :]}
        chosen: list[tuple[int, ...]] = []
        call.stats.chosen.append(chosen)
        while True:
            output = call.model.base_model(**inputs, past_key_values=row.cache, use_cache=True)
            call.stats.target_forwards += 1
            numbers, logits = self.nearest(output.last_hidden_state[:, -1])
            number = int(numbers[0, row.choose(row.processed(logits[0]))])
            pieces = self.pieces(number)
            chosen.append(pieces)
            for piece in pieces:  # one by one, so that criteria stop inside a long token too
                entries: dict[str, Any] = {"pieces in the token": len(pieces)}
                if row.append(piece, **entries):
                    return
            if number < self._size:
                inputs = {"input_ids": torch.tensor([[number]], device=row.device)}
            else:
                inputs = {"inputs_embeds": self._inputs[number - self._size][None, None].to(call.model.dtype)}

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        from .hyper import MeanEmbedding

        embedder = MeanEmbedding(model)
        size = model.config.get_text_config().vocab_size
        pairs = [(first, second) for first in range(2, size) for second in range(first + 1, size)]

        def build(tokens: Sequence[tuple[int, ...]], **settings: Any) -> LargeVocabulary:
            return cls(tokens, embedder, top_k=size, index="exact", **settings).build(model)

        refuses = frozenset(
            {"past_key_values", "output_scores", "output_logits", "repetition_penalty", "no_repeat_ngram_size",
             "min_new_tokens", "suppress_tokens"}
        )  # fmt: skip
        return {
            "no new tokens": Example(lambda **settings: build([], **settings), exact=True, refuses=refuses),
            "pairs": Example(lambda **settings: build(pairs, **settings), refuses=refuses),
        }
