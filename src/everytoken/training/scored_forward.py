"""A causal model's forward that scores tokens instead of building logits.

Being inside ``forward``, it works under DDP and FSDP, which must see every use of a parameter; only hidden states at
the scored positions meet the head, in chunks.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UnsupportedModelError
from ..core.logprobs import CHUNK_BYTES, STATISTICS, token_stats
from ..core.scoring import base_model, head_weights, plain_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_scored_forward(model: PreTrainedModel) -> None:
    """Adds ``score=`` to a causal model's forward (under a PEFT adapter, to the model's own). With M =
    ``score["mask"]``, ``[B, T - 1]`` over tokens 1 to T - 1:

    - ``{"mask": M}`` returns the ``[N, D]`` hidden states that predict the masked tokens;
    - ``{"mask": M, "pick": (top_k, temperature)}`` returns ``[N]`` tokens: the model's own predictions there (its
      arg-max for top_k 1, else sampled from the top_k, or from all for None);
    - ``{"mask": M, "labels": [N], "needs": ..., "ref_hidden": ...}`` returns TokenStats.

    ``score["mix"] = (other_ids [B, T], share)`` reads ``(1 - share) E[input_ids] + share E[other_ids]`` instead of
    ``E[input_ids]``.

    Raises:
        UnsupportedModelError: logits are not ``head(hidden)``.
    """
    model = base_model(model)
    original = model.forward
    if getattr(original, "scores", False):
        return
    plain_head(model)

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
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        hidden = hidden[:, -score["mask"].shape[1] - 1 : -1][score["mask"]]
        if "labels" not in score and "pick" not in score:
            return hidden
        weight, bias = head_weights(self)
        if "pick" in score:
            return _pick(hidden, weight, bias, *score["pick"])
        arguments: dict[str, Any] = {name: score.get(name) for name in ("ref_hidden", "ref_weight", "ref_bias")}
        arguments |= {name: name in score["needs"] for name in STATISTICS}
        return token_stats(hidden, weight, score["labels"], bias=bias, **arguments)

    forward.scores = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


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
def _pick(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, top_k: int | None, temperature: float
) -> torch.Tensor:
    """Predicted tokens ``[N]``, chunk by chunk."""
    picked = torch.empty(hidden.shape[0], dtype=torch.long, device=hidden.device)
    size = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for first in range(0, hidden.shape[0], size):
        part = slice(first, first + size)
        logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
        if top_k == 1:
            picked[part] = logits.argmax(-1)
            continue
        if top_k is not None:
            logits, tokens = logits.topk(min(top_k, logits.shape[-1]), -1)
        chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1)
        picked[part] = (tokens.gather(1, chosen) if top_k is not None else chosen)[:, 0]
    return picked
