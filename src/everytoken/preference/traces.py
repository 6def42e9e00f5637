"""What a preference-trained model thinks of a response, token by token, against its reference."""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import BadInputError
from ..core.logprobs import token_stats
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
    hidden = [m.base_model(input_ids=ids).last_hidden_state[0, len(before) - 1 : -1] for m in (model, reference)]
    heads = [m.get_output_embeddings().weight for m in (model, reference)]
    stats = token_stats(
        hidden[0], heads[0], ids[0, len(before) :], ref_hidden=hidden[1], ref_weight=heads[1], forward_kl=True
    )
    assert stats.ref_logps is not None and stats.forward_kl is not None
    trace = TokenTrace(after, title=title, station="preference")
    trace.add("implicit_reward", beta * (stats.logps - stats.ref_logps))
    trace.add("forward_kl", stats.forward_kl)
    trace.add("logp", stats.logps).add("ref_logp", stats.ref_logps)
    return trace.with_text(tokenizer)
