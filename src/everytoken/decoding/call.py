"""One ``generate`` call while a decoder answers it: what belongs to the call, and not to the decoder.

A decoder object holds settings only. Everything that changes during a call is in its ``DecodingCall``, so one decoder
can serve several threads at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..core.trace import TokenTrace

if TYPE_CHECKING:
    import torch
    from transformers import Cache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from .row import DecodingRow


@dataclass
class DecodingStats:
    """Counters of one ``generate`` call, summed over its rows. A method with more to count inherits it.

    Attributes:
        new_tokens: tokens returned.
        target_forwards: forward passes of the model itself, the prompt's included.
        draft_forwards: forward passes of a helper model.
        proposed: tokens proposed by the helper.
        accepted: proposals kept.
        rounds: verification rounds.
        seconds: wall-clock time of the call.
    """

    new_tokens: int = 0
    target_forwards: int = 0
    draft_forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    rounds: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_accepted(self) -> float:
        """Accepted proposals per round (each round adds one token of the target's own on top)."""
        return self.accepted / self.rounds if self.rounds else 0.0

    def as_dict(self) -> dict[str, float]:
        """All counters that are numbers, and the two rates."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        return numbers | {"tokens_per_second": self.tokens_per_second, "mean_accepted": self.mean_accepted}


StatsT = TypeVar("StatsT", bound=DecodingStats)


@dataclass
class DecodingCall(Generic[StatsT]):
    """What one ``generate`` call asks for, and what has become of it so far.

    Attributes:
        model: the model to decode with.
        input_ids: ``[B, T]`` the prompts, padded on the left.
        config: the call's generation configuration, a copy: a decoder may change it.
        processors: the call's logits processors, in transformers' order.
        criteria: the call's stopping criteria.
        streamer: gets every token as it becomes final, or None.
        synced_gpus: whether all processes must make the same number of forwards (sharded weights).
        model_kwargs: further inputs as transformers prepared them (``attention_mask``, ``past_key_values``, ...).
        stats: the counters; ``decoder.stats`` shows them after the call.
        trace: one TokenTrace a row, if the decoder traces.
        rows: one ``DecodingRow`` a prompt; empty in transformers' own loops.
        by_steps: whether the model is handed more than tokens, positions and a cache, or keeps its state elsewhere: the
            texts are read by ``generate``'s own steps then (``steps.py``).
    """

    model: PreTrainedModel
    input_ids: torch.Tensor
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    synced_gpus: bool
    model_kwargs: dict[str, Any]
    stats: StatsT
    trace: list[TokenTrace] = field(default_factory=list)
    rows: list[DecodingRow] = field(default_factory=list)
    by_steps: bool = False

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """``[B, N]``, or None where nothing is padded."""
        return self.model_kwargs.get("attention_mask")

    @property
    def cache(self) -> Cache | None:
        """The cache that ``generate`` made or was given, under either name; None where the model takes none."""
        caches = (self.model_kwargs.get(name) for name in ("past_key_values", "cache_params"))
        return next((cache for cache in caches if cache is not None), None)

    @cached_property
    def vocab_size(self) -> int:
        """The width of the model's logits; asked for at every token, where a configuration's attributes are slow."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def wants(self) -> list[str]:
        """What is to be returned for every token: of ``output_scores`` and ``output_logits`` those that were asked
        for."""
        names = ("output_scores", "output_logits")
        return [name for name in names if self.config.return_dict_in_generate and getattr(self.config, name)]
