"""InsertionLM: a network that reads a text with holes it does not see, and says what is missing (arXiv 2505.05755).

From the tokens that stay, one softmax scores every pair of a gap and a token, and a stop head reads the first token::

    p(k, v | z) = softmax over open gaps k and tokens v of logits[k, v]       v goes right behind k
    loss        = -1/n sum of the n missing log p(anchor, token | z)  +  CE(stop; class 0 where n = 0)

Missing tokens may stay in the tensor: ``labels`` names them, attention leaves them out, and positions count what is
left. The logits of what stays are those of the text without them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.generic import can_return_tuple

from ...core.errors import BadInputError
from ..any_order.losses import insertion_logps
from ..any_order.modeling_any_order import AnyOrderLM, AnyOrderOutput
from ..base import register
from .configuration_ilm import InsertionLMConfig
from .sampling import InsertionSampler


class InsertionLM(AnyOrderLM):
    """The network; see the module's docstring.

    ``generate`` inserts, by an ``InsertionSampler``: the likeliest each time, or drawn with ``do_sample=True``.
    """

    config_class = InsertionLMConfig
    config: InsertionLMConfig  # type: ignore[assignment]
    accepts_loss_kwargs = False
    """For transformers' Trainer: the loss is a mean over rows, so that parts of a batch are averaged."""

    def open_gaps(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, T]`` bool, the tokens right behind which something may be inserted.

        The first token of a row is none of them, and the question is none unless ``config.prefix_gaps``. A row without
        a BOS token has no question.

        Args:
            attention_mask: ``[B, T]``; what is not attended to is no token.
        """
        there = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        gaps = there & (there.cumsum(1) > 1)
        if self.config.prefix_gaps or self.config.bos_token_id is None:
            return gaps
        begins = (input_ids == self.config.bos_token_id) & there
        ahead = begins.flip(1).cumsum(1).flip(1)  # how many BOS tokens stand here or later
        return gaps & ((ahead == 0) | (begins & (ahead == 1)))

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        open_gaps: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> AnyOrderOutput:
        """Logits ``[B, T, V]`` of insertions right behind each token, ``stop_logits [B, 2]``, and the loss of labels.

        Args:
            input_ids: ``[B, T]``, or ``inputs_embeds [B, T, d]``; a CLS token first.
            attention_mask: ``[B, T]``, 1 where there is a token; padding may be on either side.
            position_ids: ``[B, T]``; None counts the tokens that are there.
            labels: ``[B, T]``, the ids of missing tokens at their places, -100 elsewhere. What ``input_ids`` hold at
                these places is not read.
            open_gaps: ``[B, T]`` bool; None finds them (``open_gaps()``).

        Raises:
            BadInputError: neither ids nor embeddings or both; or labels of padding, without a token on their left, in
                closed gaps, or of embeddings whose question is not known.
        """
        if labels is None:
            return super().forward(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise BadInputError("Labels of missing tokens need an attention_mask [B, T].")
        missing = labels != -100
        given = torch.ones_like(missing) if attention_mask is None else attention_mask.bool()
        there = given & ~missing
        output: AnyOrderOutput = super().forward(input_ids, there.long(), position_ids, inputs_embeds, return_dict=True)
        if open_gaps is None:
            if input_ids is None and not self.config.prefix_gaps:
                raise BadInputError("Embeddings do not say where the question ends.", "Give open_gaps [B, T].")
            open_gaps = self.open_gaps(labels if input_ids is None else input_ids, there)
        gaps = open_gaps.bool() & there
        place = torch.arange(labels.shape[1], device=labels.device)
        anchor = torch.where(there, place, -1).cummax(1).values
        if not torch.compiler.is_compiling():  # a graph cannot ask for values
            self._check_labels(missing, given, anchor, gaps)
        logps = insertion_logps(output.logits, gaps)
        flat = anchor.clamp(min=0) * logps.shape[-1] + labels.clamp(min=0)
        picked = logps.flatten(1).gather(1, flat)
        count = missing.sum(1)
        inserted = -torch.where(missing, picked, 0.0).sum(1) / count.clamp(min=1)
        stop = F.cross_entropy(output.stop_logits.float(), (count > 0).long(), reduction="none")  # type: ignore[union-attr]
        output.loss = (inserted + stop).mean()
        return output

    @staticmethod
    def _check_labels(missing: torch.Tensor, given: torch.Tensor, anchor: torch.Tensor, gaps: torch.Tensor) -> None:
        if bool((missing & ~given).any()):
            raise BadInputError("A token of padding cannot be missing.")
        if not bool(gaps.any(1).all()):
            raise BadInputError("A row has no open gap.", "Texts begin with CLS and BOS tokens, which stay.")
        if bool((missing & ~gaps.gather(1, anchor.clamp(min=0))).any()) or bool((anchor[missing] < 0).any()):
            raise BadInputError(
                "A missing token has no open gap on its left.", "Label tokens of the answer, or set prefix_gaps=True."
            )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' ``generate``: ids ``[B, Z]``, padded on the right, at most ``max_new_tokens`` longer.

        Args:
            args, kwargs: of ``generate``. Without ``custom_generate``, ``do_sample``, ``temperature`` and ``top_p``
                make an ``InsertionSampler`` (with ``top_p`` one that chooses the gap first).

        Raises:
            BadInputError: ``top_k``, ``min_p``, ``min_new_tokens`` or beams, which an insertion does not have.
        """
        if kwargs.get("custom_generate") is None:
            for name, neutral in (("top_k", 0), ("min_p", None), ("min_new_tokens", None), ("num_beams", 1)):
                if kwargs.get(name) not in (None, neutral):
                    raise BadInputError(f"{type(self).__name__} has no {name}.", f"Leave {name} out.")
            given, share = kwargs.pop("temperature", None), kwargs.pop("top_p", None)
            level = (1.0 if given is None else float(given)) if kwargs.pop("do_sample", False) else 0.0
            kept = 1.0 if share is None or level == 0 else float(share)
            order = "joint" if kept == 1 else "gap-first"
            kwargs["custom_generate"] = InsertionSampler(order, temperature=level, top_p=kept)
        return super().generate(*args, **kwargs)


register(InsertionLMConfig, InsertionLM, "AutoModelForMaskedLM")
