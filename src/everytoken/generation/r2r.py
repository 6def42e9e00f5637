"""R2R: a small model writes; a router hands the tokens that matter to the large one (arXiv 2505.21600).

A small model mostly writes the large one's tokens, or harmless variants of them. A few tokens send the reasoning another way. At
every step the small model chooses a token y; a router reads its last hidden state h, the embedding of y and its largest logits l,
and says how likely y is *divergent*::

    p = router(h, e_y, top-100 l)          y stays if p < threshold, else the large model writes this token

The large model reads all tokens since its last turn in one forward. Both caches persist; what a step costs on average is
``(1 - f) P_small + f P_large`` parameters, with f the large model's share of the tokens (``stats``, and the trace).

    large.generate(**inputs, custom_generate=R2R(small, router="folder"))

``everytoken train r2r`` makes the labels and trains the router (``r2r_training``); ``EntropyRouter`` and ``AleatoricRouter`` are the
baselines that need no training. A ``FeatureDraftForCausalLM`` can be the small model too: it reads the large one's hidden states
where there are any and its own elsewhere (the large model then writes the first token).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from transformers import DynamicCache

from ..core.errors import BadInputError, TokenizerMismatchError
from ..core.loading import load_model, resolve
from ..core.trace import TokenTrace
from ..decoding.base import (
    BY_NAME,
    Decoder,
    DecodingStats,
    check_croppable,
    check_one_row,
    check_prompt,
    check_same_vocabulary,
    check_unread,
    refuse_unsupported,
    split_rows,
)
from ..decoding.row import DecodingOutput, Row, collect, read_on
from .drafting import DraftSession
from .trees import TokenTree


# -- routers -------------------------------------------------------------------------------------------------------------
@runtime_checkable
class Router(Protocol):
    """``(hidden [N, D], embedding [N, E], logits [N, V]) -> [N]``: a value for each token, divergent from the threshold on."""

    threshold: float

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor: ...


@dataclass
class EntropyRouter:
    """Baseline: the entropy of the small model's distribution, in nats."""

    threshold: float = 1.5

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Categorical(logits=logits.float()).entropy()


@dataclass
class AleatoricRouter:
    """Baseline: expected entropy under a Dirichlet whose evidence are the largest (positive) logits.

    With ``a_k = max(l_k, 0) + 1`` over the top K and ``a`` their sum: ``-sum_k a_k/a (digamma(a_k + 1) - digamma(a + 1))``.

    Args:
        threshold: nats.
        top_k: logits that count as evidence.
    """

    threshold: float = 1.5
    top_k: int = 10

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        evidence = logits.float().topk(min(self.top_k, logits.shape[-1]), -1).values.clamp(min=0) + 1
        total = evidence.sum(-1, keepdim=True)
        return -(evidence / total * (torch.digamma(evidence + 1) - torch.digamma(total + 1))).sum(-1)


class LearnedRouter:
    """A trained ``TokenRouter`` as a router: values are probabilities."""

    def __init__(self, network: Any):
        self.network = network.eval()
        self.threshold = float(network.config.threshold)

    def __call__(self, hidden: torch.Tensor, embedding: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        from .routers.modeling_token_router import top_logits

        config = self.network.config
        if hidden.shape[-1] != config.state_size or embedding.shape[-1] != config.embedding_size:
            raise BadInputError(
                f"The router reads states of size {config.state_size} and embeddings of size {config.embedding_size}; this small model "
                f"has {hidden.shape[-1]} and {embedding.shape[-1]}.",
                "It was trained for another small model.",
            )
        with torch.inference_mode():
            return torch.sigmoid(self.network(hidden, embedding, top_logits(logits, config.top_logits)).float())


def as_router(value: Any) -> Router:
    """A router from what a user may pass: None (entropy), ``"entropy"``, ``"aleatoric"``, a folder, a network, or a router.

    Raises:
        BadInputError: nothing of the kind.
    """
    from .routers import load_router
    from .routers.modeling_token_router import TokenRouter

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


# -- the small model's side ----------------------------------------------------------------------------------------------
class Writer:
    """A small causal language model that follows a text with a cache of its own."""

    needs_target = False

    def __init__(self, small: Any, vocab: int):
        self.model, self.vocab, self.cache = small, vocab, DynamicCache()
        self.embed = small.get_input_embeddings()
        self._seen: torch.Tensor | None = None
        self._hook = small.get_output_embeddings().register_forward_pre_hook(self._see)

    def _see(self, _module: Any, args: Any) -> None:
        self._seen = args[0]

    def step(self, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads what is new of ``text``: the last hidden state ``[D]`` and logits ``[V]`` after it."""
        logits = read_on(self.model, self.cache, text, self.vocab)
        assert self._seen is not None
        return self._seen[0, -1], logits

    def caught_up(self, text: list[int], token: int) -> None:
        """The large model has read ``text`` and written ``token``."""

    def close(self) -> None:
        self._hook.remove()


class DraftWriter(Writer):
    """A feature draft: what it has written since the large model's last turn is a chain below the last verified token."""

    needs_target = True

    def __init__(self, small: Any, target: Any, vocab: int):
        self.vocab, self.session = vocab, DraftSession(small, target, vocab)
        self.embed = target.get_input_embeddings()
        self.verified = 0  # tokens of the text that the large model has read
        self.tree = TokenTree()

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


def writer_for(small: Any, large: Any, vocab: int) -> Writer:
    from .drafts.modeling_feature_draft import FeatureDraftForCausalLM

    return DraftWriter(small, large, vocab) if isinstance(small, FeatureDraftForCausalLM) else Writer(small, vocab)


# -- decoding ------------------------------------------------------------------------------------------------------------
@dataclass
class R2R(Decoder):
    """Decoding by a small model, with a router that calls the large one (the model it is given to).

    Args:
        small_model: a causal language model with the same tokenizer (or its hub id or folder), or a ``FeatureDraftForCausalLM``. None is only allowed for the
            embedded model, whose draft ships with the package.
        router: a folder, a ``TokenRouter``, ``"entropy"``, ``"aleatoric"``, or any ``Router``; None routes by entropy.
        threshold: value from which the large model writes the token; None is the router's own. 0 gives the large model's own text,
            anything above 1 (for probabilities) the small model's.
        matcher: a ``Matcher`` in its initial state: the text stays inside what it allows.

    Rows of a batch are decoded one after the other: the two models would lag in each row by another number of tokens. The trace has
    ``source`` ("small" or "large") and ``divergence``, the router's value.

    ``stats``: ``target_forwards`` and ``draft_forwards`` of the large and the small model, ``proposed`` tokens of the small one and
    how many were ``accepted``.
    """

    lossless: ClassVar[bool] = False
    small_model: Any = field(default=None, metadata=BY_NAME)
    router: Any = field(default=None, metadata=BY_NAME)
    threshold: float | None = None
    matcher: Any = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.threshold is not None and self.threshold < 0:
            raise BadInputError(f"threshold must not be negative; got {self.threshold}.")
        if isinstance(self.router, (str, Path)) and self.router not in ("entropy", "aleatoric"):
            self.router = as_router(self.router)  # a wrong folder is refused now, not after the models have loaded
        if isinstance(self.small_model, str):
            resolve(self.small_model)
        self._parameters: list[int] = [0, 0, 0]

    def load_helpers(self, model: Any) -> None:
        if self.small_model is None:
            from .drafts import load_draft

            self.small_model = load_draft(model)
        elif isinstance(self.small_model, str):
            self.small_model = load_model(self.small_model, dtype=model.dtype, device=model.device)

    @property
    def large_share(self) -> float:
        """Share of the tokens that the large model wrote in the last call."""
        return 1 - self.stats.accepted / self.stats.new_tokens if self.stats.new_tokens else 0.0

    def figures(self) -> dict[str, float]:
        small, large, router = self._parameters
        share = self.large_share
        return {
            "large model's share": share,
            "parameters a token, M": ((1 - share) * small + share * large + router) / 1e6,
            "large model's forwards": float(self.stats.target_forwards),
        }

    @torch.inference_mode()
    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> DecodingOutput | torch.Tensor:
        """Decodes as ``generate`` would; see ``Decoder``.

        Raises:
            BadInputError: an empty or too long prompt, or a generation mode that a routed path cannot honour.
            TokenizerMismatchError: the models have different vocabularies.
        """
        began = time.perf_counter()
        config = generation_config if generation_config is not None else model.generation_config
        refuse_unsupported("R2R", config, synced_gpus)
        check_prompt(model, input_ids.shape[1])
        with torch.inference_mode(False):  # its weights outlive this call
            self.load_helpers(model)
        try:
            vocab = check_same_vocabulary(model, self.small_model)
        except TokenizerMismatchError as error:
            raise TokenizerMismatchError(
                error.message.replace("The draft", "The small model").replace("the target", "the large model"),
                "R2R needs two models with one tokenizer.",
            ) from error
        router = as_router(self.router)
        threshold = router.threshold if self.threshold is None else self.threshold
        cache = model_kwargs.get("past_key_values")
        rows = split_rows(input_ids, model_kwargs.get("attention_mask"))
        check_one_row("R2R", len(rows), streamer, cache)
        self.stats, self.trace = DecodingStats(), []
        network = getattr(router, "network", None)
        self._parameters = [
            sum(item.numel() for item in part.parameters()) if part is not None else 0
            for part in (self.small_model, model, network)
        ]
        columns = ("source", "divergence") if self.trace_enabled else None
        results, mine = [], cache
        for ids, padding in rows:
            row = Row(ids, padding, logits_processor, stopping_criteria, config, streamer, self.matcher, columns)
            mine = cache if len(rows) == 1 and cache is not None else DynamicCache()
            check_croppable("R2R", mine)
            self._decode(row, model, mine, vocab, router, threshold)
            results.append(row)
            if row.columns is not None:
                self.trace.append(TokenTrace(row.new, columns=row.columns, station="generation"))
        if streamer is not None:
            streamer.end()
        self.stats.seconds = time.perf_counter() - began
        return collect(self, results, input_ids, config, mine)

    def _decode(self, row: Row, large: Any, cache: Any, vocab: int, router: Router, threshold: float) -> None:
        """One row: the small model proposes, the router decides, the large model catches up and writes."""
        check_unread(cache, len(row.text))
        writer = writer_for(self.small_model, large, vocab)
        if writer.needs_target and cache.get_seq_length() > 0:
            raise BadInputError(
                "A feature draft as the small model starts from an empty cache.", "Leave past_key_values out."
            )
        try:
            done = False
            while not done:
                value = None
                if not writer.needs_target or row.new:
                    hidden, logits = writer.step(row.text)
                    self.stats.draft_forwards += 1
                    self.stats.proposed += 1
                    scores = row.processed(logits)
                    token = row.choose(scores)
                    embedding = writer.embed(torch.tensor([token], device=hidden.device))
                    value = float(router(hidden[None], embedding, logits[None])[0])
                if value is None or value >= threshold:
                    logits = read_on(large, cache, row.text, vocab)  # all since its last turn, in one forward
                    self.stats.target_forwards += 1
                    scores = row.processed(logits)
                    token = row.choose(scores)
                    writer.caught_up(row.text, token)
                    done = row.append(token, scores, logits, source="large", divergence=value)
                else:
                    self.stats.accepted += 1
                    done = row.append(token, scores, logits, source="small", divergence=value)
        finally:
            writer.close()
