"""Beam search over Q*: likelihood search under a preference-trained model is search with its value function (arXiv
2404.12358).

A model trained with DPO is the optimal policy of an implicit reward, so the logits are a soft Q-function, and the sum
of its log-probabilities along a partial answer ranks answers by the reward they lead to. Beam search keeps the
``width`` best::

    likelihood:  sum_t log pi(y_t | s_t)                        the paper's search, without length normalisation
    value:       sum_t beta [log pi - log ref](y_t | s_t)       the implicit reward itself, for comparison

Quality rises with the width and falls again when it is large, as with any beam. transformers' own beam search runs it;
the trace has each token's log-probability and, with a reference, its implicit reward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..core.converted import check_model_name
from ..core.errors import BadInputError
from ..core.implicit_reward import ImplicitReward
from ..core.loading import load_model
from ..core.trace import TokenTrace
from ..decoding.base import BY_NAME, Example
from ..decoding.call import DecodingCall
from ..decoding.checks import check_empty_cache, refuse_inputs
from ..decoding.inputs import check_unchanged_inputs, device_of
from ..decoding.loop import LoopDecoder
from ..decoding.processors import processors_for_beams


class ValueSearch(LogitsProcessor):
    """Turns a policy's log-probabilities into implicit rewards by taking the reference's away; follows reordered
    beams."""

    def __init__(self, reference: PreTrainedModel, beta: float, attention_mask: torch.Tensor | None):
        self.reference, self.beta, self.mask = reference, beta, attention_mask
        self.cache = DynamicCache()
        self.rows: dict[tuple[int, ...], int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        texts = [tuple(row) for row in input_ids.tolist()]
        past = self.cache.get_seq_length()
        if past:  # beams are picked from last step's rows, some twice and some never
            index = torch.tensor([self.rows[text[:past]] for text in texts], device=input_ids.device)
            self.cache.batch_select_indices(index)
        kwargs: dict[str, Any] = {}
        if self.mask is not None:
            extra = input_ids.shape[1] - self.mask.shape[1]
            mask = torch.nn.functional.pad(self.mask, (0, extra), value=1)
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            kwargs = {"attention_mask": mask, "position_ids": positions[:, past:]}
        output = self.reference(
            input_ids=input_ids[:, past:], past_key_values=self.cache, use_cache=True, logits_to_keep=1, **kwargs
        )
        self.rows = {text: row for row, text in enumerate(texts)}
        return self.beta * (scores - torch.log_softmax(output.logits[:, -1].float(), -1))


@dataclass
class QStarBeam(LoopDecoder):
    """Beam search on a preference-trained model.

    Args:
        width: beams; 1 is greedy decoding.
        reference: the model that training started from (or its hub id or folder); needed for ``score="value"`` and for
            implicit rewards in the trace.
        beta: the strength that the policy was trained with.
        score: ``"likelihood"`` or ``"value"``.
        length_penalty: exponent of the length by which sums are divided; 0 as in the paper.

    ``num_beams`` of a call, where given, goes before ``width``. Beams start from an empty cache and take no streamer.
    The trace has ``logp``, each token's log-probability, and with a reference ``implicit_reward``.
    """

    lossless: ClassVar[bool] = False
    changes_model: ClassVar[bool] = False
    trace_columns: ClassVar[tuple[str, ...]] = ("logp", "implicit_reward")
    colour: ClassVar[str] = "logp"
    width: int = 5
    reference: Any = field(default=None, metadata=BY_NAME)
    beta: float = 0.1
    score: str = "likelihood"
    length_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.width < 1 or self.beta <= 0:
            raise BadInputError(f"QStarBeam needs width >= 1 and beta > 0; got {self.width}, {self.beta}.")
        if self.score not in ("likelihood", "value"):
            raise BadInputError(f"score is 'likelihood' or 'value'; got {self.score!r}.")
        if isinstance(self.reference, str):
            check_model_name(self.reference)  # a wrong name is refused now
        if self.score == "value" and self.reference is None:
            raise BadInputError(
                "Value search compares with a reference.", "Pass reference=..., or search by likelihood."
            )

    @property
    def streams(self) -> bool:
        return self.width == 1

    def load_helpers(self, model: PreTrainedModel) -> None:
        if isinstance(self.reference, str):
            self.reference = load_model(self.reference, dtype=model.dtype, device=device_of(model))

    def check_call(self, call: DecodingCall[Any]) -> None:
        """Turns the call into a beam search of ``width`` beams.

        Raises:
            BadInputError: a filled cache, several returned sequences without beams, or inputs that neither the
                reference nor the trace would get.
        """
        config = call.config
        given = (config.num_beams or 1) > 1
        width = int(config.num_beams) if given else self.width
        if not given and (config.num_return_sequences or 1) > 1:
            raise BadInputError("Several returned sequences need num_beams.", f"Pass num_beams={width} to generate.")
        if self.score == "value" or self.trace_enabled:
            refuse_inputs("QStarBeam, for its reference or trace,", call.model_kwargs, ())
            check_unchanged_inputs("QStarBeam, for its reference or trace,", call.model)
        if width > 1:
            check_empty_cache("QStarBeam", call.model_kwargs.get("past_key_values"))
            config.num_beams, config.length_penalty = width, self.length_penalty
            config.num_return_sequences = config.num_return_sequences or 1
            config.early_stopping = False if config.early_stopping is None else config.early_stopping
        if width > 1 and not given:
            call.processors = processors_for_beams(call.processors, width)
            call.input_ids, call.model_kwargs = call.model._expand_inputs_for_generation(
                expand_size=width, is_encoder_decoder=False, input_ids=call.input_ids, **call.model_kwargs
            )
        if self.score == "value":
            call.processors.append(ValueSearch(self.reference, self.beta, call.attention_mask))

    def applied(self, call: DecodingCall[Any]) -> AbstractContextManager[None]:
        return nullcontext()  # the model computes as it always does

    def finished(self, call: DecodingCall[Any], sequences: torch.Tensor, new: list[list[int]]) -> None:
        if not self.trace_enabled:
            return
        start, padding = call.input_ids.shape[1], call.attention_mask
        mask = torch.zeros_like(sequences, dtype=torch.bool)
        attention = torch.ones_like(sequences)
        for row, tokens in enumerate(new):
            mask[row, start : start + len(tokens)] = True
            attention[row, start + len(tokens) :] = 0
        if padding is not None:  # a row a beam; sequences are fewer
            attention[:, :start] = padding[:: len(padding) // len(sequences)]
        reward = ImplicitReward(call.model, self.reference if self.reference is not None else call.model, self.beta)
        stats = reward.statistics(sequences, mask, attention)
        credit = self.beta * (stats["logps"] - stats["ref_logps"])
        for row, tokens in enumerate(new):
            part = slice(start, start + len(tokens))
            trace = TokenTrace(tokens, columns={"logp": stats["logps"][row, part].tolist()}, station=self.station)
            if self.reference is not None:
                trace.add("implicit_reward", credit[row, part])
            call.trace.append(trace)

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        refuses = frozenset({"num_return_sequences"})
        return {
            "one beam": Example(lambda **settings: cls(1, **settings), exact=True, refuses=refuses),
            "three beams": Example(
                lambda **settings: cls(3, **settings), prefix_stable=False, refuses=refuses | {"past_key_values"}
            ),
        }

    def figures(self) -> dict[str, float]:
        sums = [sum(value for value in trace.columns["logp"] if isinstance(value, float)) for trace in self.trace]
        return super().figures() | ({"log-probability": sum(sums) / len(sums)} if sums else {})
