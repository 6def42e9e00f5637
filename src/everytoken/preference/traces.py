"""What a preference-trained model thinks of a response, token by token, against its reference."""

from __future__ import annotations

from typing import Any

import torch

from ..core.errors import BadInputError
from ..core.implicit_reward import ImplicitReward
from ..core.scoring import base_model, prompt_ids, response_logps
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
    return _credit(model, reference, tokenizer, before, after, beta, title)


def _credit(
    model: Any, reference: Any, tokenizer: Any, prompt: list[int], response: list[int], beta: float, title: str
) -> TokenTrace:
    ids = torch.tensor([prompt + response], device=model.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(prompt) :] = True
    stats = ImplicitReward(model, reference, beta).statistics(ids, mask, forward_kl=True)
    logps, ref_logps, forward_kl = (
        stats[name][0, len(prompt) :].cpu() for name in ("logps", "ref_logps", "forward_kl")
    )
    trace = TokenTrace(response, title=title, station="preference")
    trace.add("implicit_reward", beta * (logps - ref_logps))
    trace.add("forward_kl", forward_kl)
    return trace.add("logp", logps).add("ref_logp", ref_logps).with_text(tokenizer)


@torch.no_grad()
def pair_traces(policy: Any, reference: Any, tokenizer: Any, row: dict[str, Any], loss: Any) -> list[TokenTrace]:
    """Traces of a tokenized pair, chosen and rejected: the implicit reward, the forward KL, and what the loss sees besides.

    For TGDPO that is each token's weight, for cDPO its criticality ``1 - s_t``, for T-REG the contrast q of the two prompts.

    Args:
        reference: None takes a PEFT policy without its adapter.
        row: ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` and the columns of the loss.
    """
    traces = []
    beta = getattr(loss, "beta", 0.1)
    for side in ("chosen", "rejected"):
        prompt, response = list(row["prompt_ids"]), list(row[f"{side}_ids"])
        title = f"{side}: {tokenizer.decode(prompt, skip_special_tokens=True)}"
        trace = _credit(policy, reference, tokenizer, prompt, response, beta, title)
        if f"{side}_guide_logps" in row:
            reward = beta * (torch.tensor(row[f"{side}_guide_logps"]) - torch.tensor(trace.columns["ref_logp"]))
            trace.add("guide_reward", reward)
            trace.add("weight", 1 + getattr(loss, "alpha", 0.0) * reward * (1 if side == "chosen" else -1))
        if f"{side}_contrast" in row:
            trace.add("criticality", 1 - torch.tensor(row[f"{side}_contrast"]))
        if f"{side}_token_reward" in row:
            trace.add("contrast_of_prompts", torch.tensor(row[f"{side}_token_reward"]))
        traces.append(trace)
    return traces


@torch.no_grad()
def demonstration_trace(trainer: Any, tokenizer: Any, row: dict[str, Any], title: str) -> TokenTrace:
    """IFT's view of one tokenized demonstration (``input_ids``, ``labels``): loss, relation weight and prediction of every target."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    base = base_model(model)
    ids = torch.tensor([list(row["input_ids"])], device=base.device)
    labels = torch.tensor([list(row["labels"])], device=base.device)
    losses, weights, mask, predicted = trainer.token_losses(
        base, {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    )
    kept = mask[0]
    trace = TokenTrace(ids[0, 1:][kept].tolist(), title=title, station="preference")
    trace.add("weight", weights[0][kept]).add("loss", losses[0][kept])
    trace.add("prediction", tokenizer.batch_decode(predicted[0, 1:][kept][:, None]))
    return trace.with_text(tokenizer)


@torch.no_grad()
def rollout_trace(
    policy: Any, reference: Any, dpo_model: Any, tokenizer: Any, prompt: Any, response: str, settings: Any
) -> TokenTrace:
    """RTO's token rewards of a response (without the sequence's own): the DPO reward, the KL charge, and their sum."""
    before = prompt_ids(tokenizer, prompt)
    after = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *after]], device=policy.device)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, len(before) :] = True
    stats = ImplicitReward(policy, reference, 1.0).statistics(ids, mask)
    logps, ref_logps = (stats[name][0, len(before) :].cpu() for name in ("logps", "ref_logps"))
    charge = -settings.init_kl_coef * (logps - ref_logps)
    shown = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    trace = TokenTrace(after, title=f"after training: {shown}", station="preference")
    shaped = torch.zeros_like(charge)
    if dpo_model is not None:
        shaped = settings.dpo_reward_scale * (response_logps(dpo_model, ids, mask)[0, len(before) :].cpu() - ref_logps)
        if settings.dpo_reward_clip is not None:
            shaped = shaped.clamp(-settings.dpo_reward_clip, settings.dpo_reward_clip)
    trace.add("token_reward", shaped + charge).add("dpo_reward", shaped).add("kl_charge", charge)
    return trace.add("logp", logps).add("ref_logp", ref_logps).with_text(tokenizer)
