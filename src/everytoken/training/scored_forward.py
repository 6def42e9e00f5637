"""A causal model's forward that scores tokens instead of building logits.

Being inside ``forward``, it works under DDP and FSDP, which must see every use of a parameter; only hidden states at
the scored positions meet the head, in chunks.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UnsupportedModelError
from ..core.logprobs import STATISTICS, OutputHead, token_stats, tokens_per_chunk
from ..core.scoring import base_model, head_module, output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_scored_forward(model: PreTrainedModel) -> None:
    """Adds ``score=`` to a causal model's forward (under a PEFT adapter, to the model's own). With M =
    ``score["mask"]``, ``[B, T - 1]`` over tokens 1 to T - 1:

    - ``{"mask": M}`` returns the ``[N, D]`` hidden states that predict the masked tokens;
    - ``{"mask": M, "pick": (top_k, temperature)}`` returns ``[N]`` tokens: the model's own predictions there (its
      arg-max for top_k 1, else sampled from the top_k, or from all for None);
    - ``{"mask": M, "labels": [N], "needs": ..., "ref_hidden": [N, D], "ref_head": OutputHead}`` returns TokenStats
      (without the last two no reference is scored); with ``"aux_loss": True`` also a mixture of experts'
      load-balancing loss over the batch.

    ``score["mix"] = (other_ids [B, T], share)`` reads ``(1 - share) E[input_ids] + share E[other_ids]`` instead of
    ``E[input_ids]``.

    Raises:
        UnsupportedModelError: logits that the fused statistics do not follow (``core.scoring.output_head``).
    """
    model = base_model(model)
    original = model.forward
    if getattr(original, "scores", False):
        return
    head_module(model)

    def forward(self: Any, *args: Any, score: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if score is None:
            return original(*args, **kwargs)
        kwargs.pop("labels", None)
        kwargs["use_cache"] = False
        if score.get("mix") is not None:
            other, share = score["mix"]
            embed = input_embeddings(self)
            ids = kwargs.pop("input_ids")
            kwargs["inputs_embeds"] = (1 - share) * embed(ids) + share * embed(other)
        if score.get("aux_loss"):
            kwargs["output_router_logits"] = True
        outputs = self.base_model(*args, **kwargs)
        hidden = outputs.last_hidden_state
        hidden = hidden[:, -score["mask"].shape[1] - 1 : -1][score["mask"]]
        if "labels" not in score and "pick" not in score:
            return hidden
        head = output_head(self)
        if "pick" in score:
            return _pick(hidden, head, *score["pick"])
        arguments: dict[str, Any] = {name: name in score["needs"] for name in STATISTICS}
        if score.get("ref_head") is not None:
            reference: OutputHead = score["ref_head"]
            arguments |= {
                "ref_hidden": score["ref_hidden"],
                "ref_weight": reference.weight,
                "ref_bias": reference.bias,
                "ref_rule": reference.rule,
            }
        stats = token_stats(hidden, head.weight, score["labels"], bias=head.bias, rule=head.rule, **arguments)
        if score.get("aux_loss"):
            stats.aux_loss = load_balancing_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        return stats

    forward.scores = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def load_balancing_loss(
    model: PreTrainedModel, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """A mixture of experts' load-balancing loss, as transformers has it: a scalar, before its coefficient."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # the one that all families use

    config: Any = model.config.get_text_config()
    found: Any = load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)
    return found


@contextlib.contextmanager
def fused_like(model: PreTrainedModel, temperature: float) -> Iterator[None]:
    """Within it a model scores as TRL's GRPOTrainer makes its policy score, ``forward(..., fused_lm_head=True)``; its
    own forward is back afterwards, so that trainers with other settings may share it.
    """
    from trl.trainer.utils import add_fused_lm_head

    inner = base_model(model)
    before = vars(inner).get("forward")
    add_fused_lm_head(inner, temperature=temperature)
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


def input_embeddings(model: PreTrainedModel) -> Any:
    """The input embedding module.

    Raises:
        UnsupportedModelError: the model has none that can be reached.
    """
    try:
        found = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        found = None
    if found is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no input embeddings that can be mixed.")
    return found


def reference_adapter(policy: PreTrainedModel) -> Any:
    """A context in which a PEFT policy is its own reference: the adapter ``ref`` where there is one, else none."""
    from trl.trainer.utils import use_adapter

    return use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)


@torch.no_grad()
def _pick(hidden: torch.Tensor, head: OutputHead, top_k: int | None, temperature: float) -> torch.Tensor:
    """Predicted tokens ``[N]``, chunk by chunk."""
    picked = torch.empty(hidden.shape[0], dtype=torch.long, device=hidden.device)
    size = tokens_per_chunk(head.weight.shape[0], hidden.device)
    for first in range(0, hidden.shape[0], size):
        part = slice(first, first + size)
        logits = head.logits(hidden[part])
        if top_k == 1:
            picked[part] = logits.argmax(-1)
            continue
        if top_k is not None:
            logits, tokens = logits.topk(min(top_k, logits.shape[-1]), -1)
        chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
        picked[part] = (tokens.gather(1, chosen) if top_k is not None else chosen)[:, 0]
    return picked
