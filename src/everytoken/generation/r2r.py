"""R2R: a small model writes; a router hands the tokens that matter to the large one (arXiv 2505.21600).

A small model mostly writes the large one's tokens, or harmless variants of them. A few tokens send the reasoning
another way. At every step the small model chooses a token y; a router reads its last hidden state h, the embedding of y
and its largest logits l, and says how likely y is *divergent*::

    p = router(h, e_y, top-100 l)          y stays if p < threshold, else the large model writes this token

The large model reads all tokens since its last turn in one forward. Both caches persist; what a step costs on average
is ``(1 - f) P_small + f P_large`` parameters, with f the large model's share of the tokens (``stats``, and the trace).

    large.generate(**inputs, custom_generate=R2R(small, router="folder"))

``everytoken train r2r`` makes the labels and trains the router (``routing.training``); ``EntropyRouter`` and
``AleatoricRouter`` are the baselines that need no training. A ``FeatureDraftForCausalLM`` can be the small model too:
it reads the large one's hidden states where there are any and its own elsewhere (the large model then writes the first
token).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.converted import check_model_name
from ..core.errors import BadInputError, TokenizerMismatchError
from ..core.loading import load_model
from ..decoding.base import BY_NAME, Decoder, Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.checks import check_decoder_only, check_same_vocabulary, check_unread, is_filled
from ..decoding.inputs import check_reads_text, device_of
from ..decoding.matcher import Matcher
from ..decoding.row import DecodingRow, fit, known_tokens
from ..decoding.row_cache import RowCache, check_cached, room_before
from .speculative import check_feature_target
from .speculative.drafting import DraftSession, is_feature_draft
from .speculative.trees import TokenTree


# -- routers -----------------------------------------------------------------------------------------------------------
@runtime_checkable
class Router(Protocol):
    """``(hidden [N, D], embedding [N, E], logits [N, V]) -> [N]``: a value for each token, divergent from the threshold
    on."""

    threshold: float

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor: ...


@dataclass
class EntropyRouter:
    """Baseline: the entropy of the small model's distribution, in nats.

    Args:
        threshold: nats; the official code's.
    """

    threshold: float = 0.45

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(logits=logits.float()).entropy()


@dataclass
class AleatoricRouter:
    """Baseline: expected entropy under a Dirichlet whose evidence are the largest (positive) logits.

    With ``a_k = max(l_k, 0)`` over the top K and ``a`` their sum: ``-sum_k a_k/a (digamma(a_k + 1) - digamma(a + 1))``.
    That is the official code's measure, and its threshold. It grows with K and with the size of the logits, not with
    what entropy measures: the two thresholds cannot be exchanged.

    Args:
        threshold: nats.
        top_k: logits that count as evidence.
    """

    threshold: float = 2.275
    top_k: int = 10

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        evidence = logits.float().topk(min(self.top_k, logits.shape[-1]), -1).values.clamp(min=1e-6)
        total = evidence.sum(-1, keepdim=True)
        return -(evidence / total * (torch.digamma(evidence + 1) - torch.digamma(total + 1))).sum(-1)


class LearnedRouter:
    """A trained ``TokenRouter`` as a router: values are probabilities."""

    def __init__(self, network: Any):
        self.network = network.eval()
        self.threshold = float(network.config.threshold)

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        from .routing.modeling_token_router import top_logits

        config = self.network.config
        if hidden.shape[-1] != config.state_size or embedding.shape[-1] != config.embedding_size:
            raise BadInputError(
                f"The router reads states of size {config.state_size} and embeddings of size {config.embedding_size}; "
                f"this small model has {hidden.shape[-1]} and {embedding.shape[-1]}.",
                "It was trained for another small model.",
            )
        with torch.inference_mode():
            return torch.sigmoid(self.network(hidden, embedding, top_logits(logits, config.top_logits)).float())


def as_router(value: Any) -> Router:
    """A router from what a user may pass: None (entropy), ``"entropy"``, ``"aleatoric"``, a folder, a network, or a
    router.

    Raises:
        BadInputError: nothing of the kind.
    """
    from .routing import load_router
    from .routing.modeling_token_router import TokenRouter

    if value is None or value == "entropy":
        return EntropyRouter()
    if value == "aleatoric":
        return AleatoricRouter()
    if isinstance(value, TokenRouter):
        return LearnedRouter(value)
    if isinstance(value, (str, Path)):
        return LearnedRouter(load_router(value))
    if isinstance(value, Router):
        return value
    raise BadInputError(
        f"router cannot be a {type(value).__name__}.", "Give a folder, a TokenRouter, 'entropy' or 'aleatoric'."
    )


# -- the small model's side --------------------------------------------------------------------------------------------
class Writer:
    """A small causal language model that follows a text with a cache of its own."""

    def __init__(self, small: PreTrainedModel, vocab: int):
        self.model, self.vocab, self.cache = small, vocab, RowCache(small)
        self.device = device_of(small)
        self.embed = small.get_input_embeddings()
        self.known = self.embed.weight.shape[0]
        self._seen: torch.Tensor | None = None
        self._thread = threading.get_ident()
        self._hook = small.get_output_embeddings().register_forward_pre_hook(self._see)

    def _see(self, _module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if threading.get_ident() == self._thread:  # the small model may serve another thread meanwhile
            self._seen = args[0]

    def step(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads what is new of ``text``: the last hidden state ``[D]`` and logits ``[V]`` after it."""
        logits: torch.Tensor = self.cache.read(known_tokens(text, self.model))["logits"]
        assert self._seen is not None
        return self._seen[0, -1], logits[0, -1, : self.vocab].float()

    def reads(self, text: list[int]) -> bool:
        """Whether the small model's context has room for ``text``."""
        return room_before(self.model, len(text)) >= 0

    def caught_up(self, text: list[int], token: int) -> None:
        """The large model has read ``text`` and written ``token``."""

    def close(self) -> None:
        self._hook.remove()


class DraftWriter(Writer):
    """A feature draft: what it has written since the large model's last turn is a chain below the last verified
    token."""

    def __init__(self, small: PreTrainedModel, target: PreTrainedModel, vocab: int):
        self.vocab, self.session = vocab, DraftSession(small, target, vocab)
        self.device = device_of(target)
        self.embed = target.get_input_embeddings()
        self.known = vocab
        self.verified = 0  # tokens of the text that the large model has read
        self.tree = TokenTree()

    def reads(self, text: list[int]) -> bool:
        return len(text) > self.verified > 0  # it follows the large model's states, which begin with its first turn

    def step(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        node = self.tree.add(text[-1], len(self.tree) - 1, 1.0)  # below the last one; the first is the root, below -1
        logits = self.session.forward(self.tree, [node], False)[0]
        return self.session.states[node], logits

    def caught_up(self, text: list[int], token: int) -> None:
        if self.verified == 0:  # the prompt, and the first token straight after it
            self.session.commit(text, 0)
            self.session.commit([token], len(text))
        else:
            self.session.commit([*text[self.verified + 1 :], token], self.verified + 1, list(range(len(self.tree))))
        self.verified = len(text)
        self.tree = TokenTree()

    def close(self) -> None:
        self.session.close()


def writer_for(small: PreTrainedModel, large: PreTrainedModel, vocab: int) -> Writer:
    return DraftWriter(small, large, vocab) if is_feature_draft(small) else Writer(small, vocab)


# -- decoding ----------------------------------------------------------------------------------------------------------
@dataclass
class R2RStats(DecodingStats):
    """Counters of a call, and the sizes of the models that took part.

    Attributes:
        parameters: of the small model, the large one and the router.
    """

    parameters: tuple[int, int, int] = (0, 0, 0)


@dataclass
class R2R(Decoder):
    """Decoding by a small model, with a router that calls the large one (the model it is given to).

    Args:
        small_model: a causal language model with the same tokenizer (or its hub id or folder), or a
            ``FeatureDraftForCausalLM``. None is only allowed for the embedded model, whose draft ships with the
            package.
        router: a folder, a ``TokenRouter``, ``"entropy"``, ``"aleatoric"``, or any ``Router``; None routes by entropy.
        threshold: value from which the large model writes the token; None is the router's own (0.45 nats for
            ``"entropy"``, 2.275 for ``"aleatoric"``, as in the official code). 0 gives the large model's own text,
            anything above 1 (for probabilities) the small model's.
        matcher: a ``Matcher`` in its initial state: the text stays inside what it allows.

    The small model may lack tokens that were added to the large one: the large one writes them where it has its turn.
    Rows of a batch are decoded one after the other: the two models would lag in each row by another number of tokens.
    The trace has ``source`` ("small" or "large") and ``divergence``, the router's value.

    ``stats``: ``target_forwards`` and ``draft_forwards`` of the large and the small model, ``proposed`` tokens of the
    small one and how many were ``accepted``.
    """

    stats_type: ClassVar[type[DecodingStats]] = R2RStats
    trace_columns: ClassVar[tuple[str, ...]] = ("source", "divergence")
    lossless: ClassVar[bool] = False
    recurrent: ClassVar[bool] = True
    small_model: Any = field(default=None, metadata=BY_NAME)
    router: Any = field(default=None, metadata=BY_NAME)
    threshold: float | None = None
    matcher: Matcher | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold < 0:
            raise BadInputError(f"threshold must not be negative; got {self.threshold}.")
        if isinstance(self.router, (str, Path)) and self.router not in ("entropy", "aleatoric"):
            self.router = as_router(self.router)  # a wrong folder is refused now, not after the models have loaded
        if isinstance(self.small_model, str):
            check_model_name(self.small_model)

    @property
    def stats(self) -> R2RStats:
        return cast(R2RStats, super().stats)

    def check_model(self, config: PreTrainedConfig) -> None:
        """Without a small model of the user's, a draft must ship for the large one.

        Raises:
            UnsupportedModelError: no small model is given and no draft ships for this model.
        """
        super().check_model(config)
        if self.small_model is None:
            from .speculative import check_draft_ships

            check_draft_ships(config)

    def load_helpers(self, model: PreTrainedModel) -> None:
        if self.small_model is None:
            from .speculative import load_draft

            self.small_model = load_draft(model)
        elif isinstance(self.small_model, str):
            self.small_model = load_model(self.small_model, dtype=model.dtype, device=device_of(model))

    @property
    def large_share(self) -> float:
        """Share of the tokens that the large model wrote in the last call."""
        return 1 - self.stats.accepted / self.stats.new_tokens if self.stats.new_tokens else 0.0

    def figures(self) -> dict[str, float]:
        small, large, router = self.stats.parameters
        share = self.large_share
        return {
            "large model's share": share,
            "parameters a token, M": ((1 - share) * small + share * large + router) / 1e6,
            "large model's forwards": float(self.stats.target_forwards),
        }

    def check_call(self, call: DecodingCall[R2RStats]) -> None:
        """Raises TokenizerMismatchError where the models have different vocabularies, BadInputError for a filled cache
        that a feature draft has not seen, UnsupportedModelError for a cache without crop."""
        try:
            check_same_vocabulary(call.model, self.small_model)
        except TokenizerMismatchError as error:
            raise TokenizerMismatchError(
                error.message.replace("The draft", "The small model").replace("the target", "the large model"),
                "R2R needs two models with one tokenizer.",
            ) from error
        check_cached("R2R", call.model)
        if not check_feature_target(self.small_model, call.model):
            check_decoder_only("R2R's small model", self.small_model.config)
            check_reads_text("R2R's small model", self.small_model, recurrent=True)
            check_cached("R2R's small model", self.small_model)
        router = as_router(self.router)
        cache = call.cache
        if cache is not None and is_feature_draft(self.small_model) and is_filled(cache):
            raise BadInputError(
                "A feature draft as the small model starts from an empty cache.", "Leave past_key_values out."
            )
        sizes = [
            sum(item.numel() for item in part.parameters()) if part is not None else 0
            for part in (self.small_model, call.model, getattr(router, "network", None))
        ]
        call.stats.parameters = (sizes[0], sizes[1], sizes[2])

    def matcher_for(self, call: DecodingCall[R2RStats], row: int) -> Matcher | None:
        return self.matcher

    def decode_row(self, call: DecodingCall[R2RStats], row: DecodingRow) -> None:
        """The small model proposes, the router decides, the large model catches up and writes."""
        assert row.cache is not None
        check_unread(row.cache, len(row.text))
        router = as_router(self.router)
        threshold = router.threshold if self.threshold is None else self.threshold
        vocab = check_same_vocabulary(call.model, self.small_model)
        large, stats = call.model, call.stats
        cache = RowCache(large, row.cache, len(row.text))
        writer = writer_for(self.small_model, large, vocab)
        try:
            done = False
            while not done:
                value = None
                if writer.reads(row.text):
                    hidden, logits = writer.step(row.text)
                    stats.draft_forwards += 1
                    stats.proposed += 1
                    scores = row.processed(fit(logits, vocab))
                    token, value = self._proposed(writer, row, router, hidden, logits, scores)
                    logits = fit(logits, vocab)
                if value is None or value >= threshold:
                    logits = cache.read(row.text)["logits"][0, -1, :vocab].float()  # all since its last turn
                    stats.target_forwards += 1
                    scores = row.processed(logits)
                    token = row.choose(scores)
                    writer.caught_up(row.text, token)
                    done = row.append(token, scores, logits, source="large", divergence=value)
                else:
                    stats.accepted += 1
                    done = row.append(token, scores, logits, source="small", divergence=value)
        finally:
            writer.close()

    def _proposed(
        self,
        writer: Writer,
        row: DecodingRow,
        router: Router,
        hidden: torch.Tensor,
        logits: torch.Tensor,
        scores: torch.Tensor,
    ) -> tuple[int, float]:
        """The small model's token and its divergence; infinite where only tokens that it lacks are allowed."""
        restricted = row.matcher is not None or len(row.processors) > 0
        if restricted and bool(scores.isneginf().all()):
            return -1, float("inf")
        token = row.choose(scores)
        if token >= writer.known:
            return token, float("inf")
        embedding = writer.embed(torch.tensor([token], device=writer.device)).to(hidden.device)
        return token, float(router(hidden[None], embedding, logits[None])[0])

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        from ..testing.models import tiny_llama

        small = tiny_llama(model.config.vocab_size, seed=9)
        return {
            "large only": Example(
                lambda **settings: cls(small, EntropyRouter(), threshold=0.0, **settings), exact=True
            ),
            "routed": Example(lambda **settings: cls(small, EntropyRouter(), threshold=0.9, **settings)),
        }
