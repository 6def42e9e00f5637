"""What a preference-trained model thinks of a response, token by token, against its reference."""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import BadInputError
from ..core.implicit_reward import ImplicitReward
from ..core.trace import TokenTrace


@torch.no_grad()
def credit_trace(
    model: Any, reference: Any, tokenizer: Any, prompt: str, response: str, beta: float = 0.1, title: str = ""
) -> TokenTrace:
    """A trace of ``response`` after ``prompt``: per token, the implicit reward ``beta (log pi - log ref)``, both
    log-probabilities, and the forward KL that TDPO charges.

    Raises:
        BadInputError: an empty response.
    """
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not after:
        raise BadInputError("The response is empty.")
    ids = torch.tensor([before + after], device=model.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(before) :] = True
    stats = ImplicitReward(model, reference, beta).statistics(ids, mask, forward_kl=True)
    logps, ref_logps, forward_kl = (stats[name][0, len(before) :] for name in ("logps", "ref_logps", "forward_kl"))
    trace = TokenTrace(after, title=title, station="preference")
    trace.add("implicit_reward", beta * (logps - ref_logps))
    trace.add("forward_kl", forward_kl)
    trace.add("logp", logps).add("ref_logp", ref_logps)
    return trace.with_text(tokenizer)
