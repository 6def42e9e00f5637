"""What a preference-trained model thinks of a response, token by token, against its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError
from ..core.implicit_reward import ImplicitReward
from ..core.logprobs import STATISTICS
from ..core.trace import TokenTrace
from .base import PairScores, PreferenceLoss, declared, trace_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Statistics = dict[str, torch.Tensor]
"""Name -> ``[len(response)]``, on the CPU."""


@torch.no_grad()
def credit_trace(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    response: str,
    beta: float = 0.1,
    title: str = "",
) -> TokenTrace:
    """A trace of ``response`` after ``prompt``: per token, the implicit reward ``beta (log pi - log ref)``, both
    log-probabilities, and the forward KL, KL(reference || policy).

    Raises:
        BadInputError: an empty response.
    """
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"] or [tokenizer.bos_token_id]
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    if not after:
        raise BadInputError("The response is empty.")
    return _trace(_statistics(model, reference, before, after), tokenizer, after, beta, title)


PAIR_COLUMNS = ("implicit_reward", "forward_kl", "logp", "ref_logp")
"""What the trace of every response has, whatever the loss."""


def _statistics(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    prompt: Sequence[int],
    response: Sequence[int],
    needs: frozenset[str] = frozenset(),
) -> Statistics:
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(prompt) :] = True
    wanted = {name: name in needs | {"forward_kl"} for name in STATISTICS}
    found = ImplicitReward(model, reference).statistics(ids, mask, None, **wanted)
    return {name: values[0, len(prompt) :].cpu() for name, values in found.items()}


def _trace(
    found: Statistics, tokenizer: PreTrainedTokenizerBase, response: Sequence[int], beta: float, title: str
) -> TokenTrace:
    trace = TokenTrace(list(response), title=title, station="preference")
    trace.add("implicit_reward", beta * (found["logps"] - found["ref_logps"]))
    trace.add("forward_kl", found["forward_kl"])
    return trace.add("logp", found["logps"]).add("ref_logp", found["ref_logps"]).with_text(tokenizer)


def column_names(loss: PreferenceLoss) -> tuple[str, ...]:
    """The columns of ``pair_traces``: those of all losses, and what the loss says of a pair of one token each."""
    inputs = declared(loss)
    one, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    values = dict.fromkeys((*inputs.needs, *inputs.data_columns), one)
    scores = PairScores(one, one, mask, mask, dict(values), dict(values))
    return (*PAIR_COLUMNS, *trace_columns(loss, scores, scores))


@torch.no_grad()
def pair_traces(
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    row: Mapping[str, Any],
    loss: PreferenceLoss,
) -> list[TokenTrace]:
    """Traces of a tokenized pair, chosen and rejected: the implicit reward, the forward KL, and what the loss shows
    (``trace_columns``).

    Args:
        reference: None takes a PEFT policy without its adapter.
        row: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and the data columns of the loss.
    """
    inputs, beta = declared(loss), getattr(loss, "beta", 0.1)
    prompt, sides = list(row["prompt_ids"]), ("chosen", "rejected")
    responses = [list(row[f"{side}_ids"]) for side in sides]
    found = [_statistics(policy, reference, prompt, response, inputs.needs) for response in responses]
    shown: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    if all(f"{side}_{name}" in row for side in sides for name in inputs.data_columns):
        for side, values in zip(sides, found, strict=True):
            values |= {name: torch.tensor(row[f"{side}_{name}"]) for name in inputs.data_columns}
        shown = trace_columns(loss, *_pair_scores(found, inputs.needs | set(inputs.data_columns)))
    traces = []
    for number, (side, response) in enumerate(zip(sides, responses, strict=True)):
        title = f"{side}: {tokenizer.decode(prompt, skip_special_tokens=True)}"
        trace = _trace(found[number], tokenizer, response, beta, title)
        for name, both in shown.items():
            trace.add(name, both[number][0, : len(response)])
        traces.append(trace)
    return traces


def _pair_scores(found: Sequence[Statistics], names: frozenset[str]) -> tuple[PairScores, PairScores]:
    """One pair as a loss reads it, policy and reference: ``[1, T]``, the shorter side padded with 0."""
    width = max(len(side["logps"]) for side in found)

    def row(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(values, (0, width - len(values)))[None]

    masks = [row(torch.ones_like(side["logps"], dtype=torch.bool)) for side in found]
    logps, ref_logps = ([row(side[name]) for side in found] for name in ("logps", "ref_logps"))
    chosen, rejected = ({name: row(side[name]) for name in names} for side in found)
    policy = PairScores(logps[0], logps[1], masks[0], masks[1], chosen, rejected)
    return policy, PairScores(ref_logps[0], ref_logps[1], masks[0], masks[1])
