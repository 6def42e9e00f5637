"""ILM as a method: a prompt whose answer grows between its tokens, beside the same network from left to right
(arXiv 2505.05755).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from transformers import PreTrainedModel

from ...core.errors import BadInputError
from ...decoding.canvas.replay import replay_html, step_lines
from ...training.datasets.star_graphs import BOS, CLS, MASK, TOKENS, star_tokenizer
from ..any_order.losses import draw_missing
from ..base import Architecture, Inputs, Network, Observation
from .configuration_ilm import InsertionLMConfig
from .modeling_ilm import InsertionLM
from .sampling import InsertionSampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 64


@dataclass
class ILM(Architecture):
    """Settings of the trial; see ``InsertionSampler``.

    Args:
        order: ``joint``, ``gap-first`` or ``left-to-right``.
        temperature: of the draws; 0 takes the likeliest.
        stop_threshold: the text ends where the stop probability reaches it.
        longest: tokens that are inserted at most.

    Raises:
        BadInputError: a setting out of range.
    """

    order: str = "joint"
    temperature: float = 0.0
    stop_threshold: float = 0.5
    longest: int = LONGEST

    declares = Network(
        InsertionLMConfig,
        InsertionLM,
        columns=InsertionSampler.trace_columns,
        auto="AutoModelForMaskedLM",
        lacks={
            "generate": "generate inserts, without the scores of a step and a least number of tokens",
            "cache": "an insertion moves all that is behind it",
            "sft": "its collator and loss are of the next token",
        },
    )
    weights: ClassVar[str] = InsertionSampler.weights
    example: ClassVar[str] = "DE CA FG AD CF  CE"
    headline: ClassVar[str] = "mean probability of an insertion"

    def __post_init__(self) -> None:
        if self.longest < 1:
            raise BadInputError(f"longest is 1 or more; got {self.longest}.")
        self.sampler()

    def sampler(self) -> InsertionSampler:
        """The sampler of these settings."""
        return InsertionSampler(
            order=self.order,
            temperature=self.temperature,
            stop_threshold=self.stop_threshold,
            gen_length=self.longest,
            trace_enabled=True,
        )

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        model = InsertionLM(
            InsertionLMConfig(
                vocab_size=len(TOKENS),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                mask_token_id=MASK,
                cls_token_id=CLS,
                bos_token_id=BOS,
                prefix_gaps=True,
                initializer_range=0.2,
            )
        )
        assert model.stop_head is not None
        with torch.no_grad():
            model.stop_head.bias.copy_(torch.tensor([-2.0, 2.0]))  # it writes something
        return model

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase:
        return star_tokenizer()

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        """Texts behind CLS and BOS that lost some of their tokens."""
        inputs = super().inputs(model, batch, length, seed)
        ids = inputs["input_ids"]
        ids[ids == BOS] = len(TOKENS) - 1
        ids[:, 0], ids[:, 1] = CLS, BOS
        response = (torch.arange(length) > 1).expand(batch, -1)
        missing = draw_missing(response, torch.Generator().manual_seed(seed))
        missing[:, -2] = True  # none is whole, so that every row has both losses
        return inputs | {"labels": ids.masked_fill(~missing, -100)}

    def arms(self) -> dict[str, Architecture]:
        if self.order == "left-to-right":
            return {}
        same = {"temperature": self.temperature, "stop_threshold": self.stop_threshold, "longest": self.longest}
        return {"from left to right": ILM(order="left-to-right", **same)}  # type: ignore[arg-type]

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """What grows behind a prompt.

        Args:
            new_tokens: insertions at most, where that is less than ``longest``; 0 takes ``longest``.

        Raises:
            BadInputError: no tokenizer, or a prompt too long for the network.
        """
        if tokenizer is None:
            raise BadInputError("A prompt needs a tokenizer, and this folder has none.")
        ids = self._prompt(model, tokenizer, text)
        sampler = self.sampler()
        sampler.gen_length = min(self.longest, new_tokens or self.longest)
        found = sampler(model, ids)  # torch's own generator gives the seed
        written = found.editable[0]
        sure = found.choice_prob[0][written]
        figures = {
            self.headline: float(sure.mean()) if len(sure) else 0.0,
            "tokens inserted": float(written.sum()),
            "forwards": float(sampler.stats.target_forwards),
        }
        assert found.stopped is not None
        notes = [] if bool(found.stopped[0]) else [f"The stop head did not end the text within {sampler.gen_length}."]
        return Observation(
            traces=[trace.with_text(tokenizer) for trace in sampler.trace],
            figures=figures,
            text=tokenizer.decode(found.new_ids(0)),
            pictures=[replay_html(found, 0, tokenizer, "Every step of the text")],
            notes=notes,
            drawing="\n".join(step_lines(found, 0, tokenizer)),
        )

    @staticmethod
    def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
        """``[1, P]``: CLS, the prompt and BOS, also of a tokenizer that adds neither."""
        ids: list[int] = tokenizer(text)["input_ids"]
        if ids[:1] != [model.config.cls_token_id]:
            ids = [model.config.cls_token_id, *ids]
        end = model.config.bos_token_id
        if end is not None and ids[-1] != end:
            ids = [*ids, end]
        return torch.tensor([ids], device=model.device)
