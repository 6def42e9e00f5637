"""Token healing: the cheap baseline for prompts that end inside a token.

The prompt's last tokens are dropped, and the model chooses again among the tokens that start with the dropped bytes.
Special tokens are never dropped, nor what stands before them: there is no word to mend at a special token.

::

    model.generate(**inputs, max_new_tokens=16, custom_generate=TokenHealing(tokenizer))
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import BadInputError
from ..core.trace import TokenTrace
from ..decoding.base import Example
from ..decoding.call import DecodingCall, DecodingStats
from ..decoding.checks import split_rows
from ..decoding.loop import LoopDecoder
from .byte_view import ByteView


@dataclass
class TokenHealingStats(DecodingStats):
    """Counters of a call.

    Attributes:
        dropped: tokens of each prompt's end that were chosen again.
    """

    dropped: int = 0


@dataclass
class TokenHealing(LoopDecoder):
    """The cheap baseline, as ``custom_generate``: the prompt's last tokens are dropped and chosen again.

    Args:
        tokenizer: the model's.
        back: how many tokens to drop at most; fewer, or none, where a special token stands among the last.

    Rows returned start with the prompt's bytes, not always with its tokens; so nothing can be streamed, and a
    ``matcher`` has no place to begin. Where a prompt's end is split into more tokens than are dropped, the bias stays.
    The trace has ``healed``: whether a token spells what was dropped.

    Raises:
        BadInputError: nothing to drop, or a matcher.
    """

    tokenizer: PreTrainedTokenizerBase
    back: int = 1
    stats_type: ClassVar[type[DecodingStats]] = TokenHealingStats
    trace_columns: ClassVar[tuple[str, ...]] = ("healed",)
    colour: ClassVar[str] = "healed"
    station: ClassVar[str] = "tokenization"
    carries: ClassVar[frozenset[str] | None] = frozenset()
    changes_model: ClassVar[bool] = False
    continues: ClassVar[bool] = False
    lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.back < 1:
            raise BadInputError(f"back is at least 1; got {self.back}.")
        if self.matcher is not None:
            raise BadInputError(
                "TokenHealing writes the prompt's end anew, where a matcher has not begun.", "Leave the matcher out."
            )
        self.view = ByteView.of(self.tokenizer)

    @property
    def streams(self) -> bool:
        return False

    def check_call(self, call: DecodingCall[TokenHealingStats]) -> None:
        """Drops the prompts' last tokens and lets the loop spell them anew.

        Raises:
            BadInputError: a prompt that is not longer than what is dropped, or prompts of which different numbers of
                tokens would be dropped.
        """
        ends = getattr(call.config, "_eos_token_tensor", None)
        stops = set() if ends is None else set(ends.flatten().tolist())
        counts = []
        for number, (ids, _) in enumerate(split_rows(call.input_ids, call.attention_mask)):
            count = self._words(ids.tolist()[-self.back :], stops)
            if len(ids) <= count:
                raise BadInputError(
                    f"TokenHealing drops {count} tokens; row {number} has {len(ids)}.", "Give longer prompts."
                )
            counts.append(count)
        if len(set(counts)) > 1:
            raise BadInputError(
                f"Special tokens end some of these prompts and not others, so TokenHealing would drop {counts} tokens "
                "of the rows.",
                "Call it for prompts of either kind apart.",
            )
        call.stats.dropped = dropped = counts[0]
        if not dropped:
            return
        length = call.input_ids.shape[1] - dropped
        data = [self.view.spell(row) for row in call.input_ids[:, length:].tolist()]
        call.processors.insert(0, Healer(self.view, data, length))
        call.input_ids = call.input_ids[:, :length]
        for name in ("attention_mask", "position_ids"):
            if call.model_kwargs.get(name) is not None:
                call.model_kwargs[name] = call.model_kwargs[name][..., :-dropped]

    def _words(self, tokens: list[int], stops: set[int]) -> int:
        """How many of the last tokens stand behind the last special one."""
        count = 0
        for token in reversed(tokens):
            if token in stops or not self.view.spell([token]):
                break
            count += 1
        return count

    def applied(self, call: DecodingCall[TokenHealingStats]) -> AbstractContextManager[None]:
        return nullcontext()  # the model computes as it always does

    def finished(self, call: DecodingCall[TokenHealingStats], sequences: torch.Tensor, new: list[list[int]]) -> None:
        call.stats.new_tokens -= call.stats.dropped * len(new)  # the prompt's end, spelled anew, is nothing new
        if not self.trace_enabled:
            return
        data = next((item.data for item in call.processors if isinstance(item, Healer)), [b""])
        for row, tokens in enumerate(new):
            left, healed = len(data[row * len(data) // len(new)]), []
            for token in tokens:
                healed.append(left > 0)
                left -= len(self.view.spell([token]))
            call.trace.append(TokenTrace(tokens, columns={"healed": list(healed)}, station=self.station))

    @classmethod
    def examples(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Example]:
        assert tokenizer is not None
        # with one token a character there is one way to spell what was dropped
        refuses = frozenset({"past_key_values", "matcher"})
        return {"one token": Example(lambda **settings: cls(tokenizer, **settings), exact=True, refuses=refuses)}


class Healer(LogitsProcessor):
    """Allows only tokens that agree with bytes still to be spelled.

    Args:
        view: the vocabulary's bytes.
        data: for each prompt what was dropped; beams of one prompt lie together.
        length: padded length of the shortened prompts.
    """

    def __init__(self, view: ByteView, data: list[bytes], length: int):
        self.view, self.data, self.length = view, data, length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        kept = scores
        for row, text in enumerate(input_ids[:, self.length :].tolist()):
            data = self.data[row * len(self.data) // len(input_ids)]
            rest = data[len(self.view.spell(text)) :]
            if not rest:
                continue
            ids = self.view.starting_with(rest)[0].tolist()
            ids += [
                token
                for size in range(1, len(rest))
                for token in self.view.starting_with(rest[:size])[0].tolist()
                if self.view.bytes[token] == rest[:size]
            ]
            kept = scores.clone() if kept is scores else kept
            kept[row] = -torch.inf
            kept[row, ids] = scores[row, ids]
        return kept
