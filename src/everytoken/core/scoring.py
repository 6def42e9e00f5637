"""Scoring given tokens with frozen models: padding rows, hidden states at the scored positions, log-probabilities.

Everything here is without gradient; training computes the same quantities inside its own forward
(``training.scored_forward``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import BadInputError, TokenizerMismatchError, UnsupportedModelError
from .progress import Report, silent
from .vocabulary import utf8

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .logprobs import LogitRule, OutputHead


class PromptResponse(NamedTuple):
    """A prompt and a response to it, both as token ids; a plain pair does as well."""

    prompt: Sequence[int]
    response: Sequence[int]


UNKNOWN_LOGITS = ("logits_soft_cap", "output_logit_soft_cap", "logits_mup_width_multiplier", "unpadded_vocab_size")
"""Settings of models that make their logits in a way of their own."""


def logit_rule(model: PreTrainedModel) -> LogitRule:
    """What a causal model makes of ``head(hidden)``, from its configuration.

    Raises:
        UnsupportedModelError: its logits are made in another way than by a factor and a soft cap.
    """
    from .logprobs import LogitRule

    config = model.config.get_text_config()
    for name in UNKNOWN_LOGITS:
        if getattr(config, name, None) is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} makes its logits in a way of its own ({name}={getattr(config, name)}), "
                "which the fused statistics do not follow."
            )
    scale: float = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        value = getattr(config, name, None)
        if value is not None:
            # logits_scaling divides (Granite, MiniCPM3), but for HyperCLOVA X, which multiplies
            divides = name == "logits_scaling" and config.model_type != "hyperclovax"
            scale = 1 / value if divides else float(value)
            break
    return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


def head_module(model: PreTrainedModel) -> Any:
    """The output head of a causal model whose logits a factor and a soft cap make of ``head(hidden)``.

    Raises:
        UnsupportedModelError: no head, logits made in another way, or an adapter on the head: its weights alone would
            not say what it does.
    """
    logit_rule(model)
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no output embeddings.", "Use a causal language model.")
    if hasattr(head, "base_layer") and not (getattr(head, "disable_adapters", False) or getattr(head, "merged", False)):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an adapter on its output head, which the fused statistics do not follow.",
            "Leave the head out of target_modules, train it whole (modules_to_save), or merge the adapter first.",
        )
    return head


def whole(parameter: Any) -> Any:
    """A parameter, gathered if FSDP holds it in shards (then every process must ask for it); None stays None."""
    return parameter.full_tensor() if parameter is not None and hasattr(parameter, "full_tensor") else parameter


def output_head(model: PreTrainedModel) -> OutputHead:
    """The head's weight and bias, gathered where they lie in shards, and the model's logit rule.

    For a PEFT model it is the head of the adapter that is active *now*: ask within the adapter's context.

    Raises:
        UnsupportedModelError: as ``head_module``.
    """
    from .logprobs import OutputHead

    head = head_module(model)
    return OutputHead(whole(head.weight), whole(getattr(head, "bias", None)), logit_rule(model))


def base_model(model: PreTrainedModel) -> Any:
    """The model under a PEFT adapter; a model without one is its own."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def check_guide(
    policy: PreTrainedModel,
    guide: PreTrainedModel,
    what: str = "guide",
    tokenizer: PreTrainedTokenizerBase | None = None,
    guide_tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Refuses a guide that reads other tokens than the policy.

    Raises:
        TokenizerMismatchError: vocabularies of different size, or (where both tokenizers are given) of different
            content.
    """
    sizes = [head_module(model).weight.shape[0] for model in (policy, guide)]
    if sizes[0] != sizes[1]:
        raise TokenizerMismatchError(
            f"The {what} has a vocabulary of {sizes[1]} tokens and the policy of {sizes[0]}: "
            "they use different tokenizers.",
            f"Token-level credit needs a {what} with the policy's own tokenizer.",
        )
    if tokenizer is None or guide_tokenizer is None:
        return
    ours, theirs = tokenizer.get_vocab(), guide_tokenizer.get_vocab()
    if ours != theirs:
        token = next(iter(set(ours.items()) ^ set(theirs.items())))
        raise TokenizerMismatchError(
            f"The {what}'s tokenizer differs from the policy's, for example in {token[0]!r}.",
            f"Token-level credit needs a {what} with the policy's own tokenizer.",
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, **template: Any) -> list[int]:
    """Ids of a prompt: of a text as it is, of messages by the chat template, up to where the answer begins.

    Args:
        template: further arguments of the chat template, such as ``tools``.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    options: dict[str, Any] = {"add_generation_prompt": True, **template}
    return list(tokenizer.apply_chat_template(prompt, return_dict=True, **options)["input_ids"])


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, by the model's generation config."""
    ends = model.generation_config.eos_token_id
    return frozenset(() if ends is None else ends if isinstance(ends, (list, tuple)) else (int(ends),))


def check_prompt(prompt: str) -> None:
    """Refuses an empty prompt, and one that is no text.

    Raises:
        BadInputError: nothing in it but spaces, or a lone surrogate.
    """
    utf8(prompt)
    if not prompt.strip():
        raise BadInputError("The prompt is empty.", 'Give some text: --prompt "Why is the sky blue?"')


def turn_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of one prompt: as a turn of the user where the tokenizer has a chat template, else of the text as it is.

    Raises:
        BadInputError: the prompt is empty.
    """
    check_prompt(prompt)
    return prompt_ids(tokenizer, [{"role": "user", "content": prompt}] if tokenizer.chat_template else prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """``generate``'s inputs for one prompt, as ``turn_ids`` has it."""
    import torch

    ids = torch.tensor([turn_ids(tokenizer, prompt)])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def pad_rows(
    rows: Sequence[PromptResponse], pad: int = 0, device: torch.device | str | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as right-padded tensors: ``ids``, ``attention_mask`` and ``mask`` (True on responses), all ``[B, T]``."""
    import torch

    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), pad)
    attention, mask = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[index, :end] = torch.tensor([*prompt, *response])
        attention[index, :end] = 1
        mask[index, len(prompt) : end] = True
    return ids.to(device), attention.to(device), mask.to(device)


def response_hidden(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The ``[N, D]`` last hidden states that predict the N tokens where ``mask``; never a row's first token."""
    kwargs: dict[str, Any] = {}
    if attention_mask is not None:
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        kwargs = {"attention_mask": attention_mask, "position_ids": positions}
    before = mask.roll(-1, 1)
    before[:, -1] = False
    inner = base_model(model)
    if getattr(
        inner.forward, "scores", False
    ):  # the only way in where weights lie in shards: see training.scored_forward
        return model(input_ids=ids, score={"mask": mask[:, 1:]}, **kwargs)
    return inner.base_model(input_ids=ids, use_cache=False, **kwargs).last_hidden_state[before]


def response_logps(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-probabilities ``[B, T]`` float32 of the tokens where ``mask``, at their own positions; 0 elsewhere.

    No gradient.
    """
    import torch

    from .logprobs import token_stats

    kept = mask.bool().clone()
    kept[:, 0] = False
    weight, bias, rule = output_head(model)
    with torch.no_grad():
        hidden = response_hidden(model, ids, kept, attention_mask)
        stats = token_stats(hidden, weight, ids[kept], bias=bias, rule=rule)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(kept, stats.logps)


def score_rows(
    rows: Sequence[PromptResponse],
    score: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    batch_size: int = 16,
    device: torch.device | str | None = None,
    report: Report = silent,
) -> list[torch.Tensor]:
    """One ``[len(response)]`` tensor a row from a function on padded batches; rows of like length share a batch.

    Args:
        score: ``(ids, mask, attention_mask) -> values [B, T]``, as ``response_logps``.
        report: called with ``("scoring rows", done, total)``.

    Raises:
        BadInputError: an empty prompt (nothing would predict the first token) or response; names the row.
    """
    for index, (prompt, response) in enumerate(rows):
        if not len(prompt) or not len(response):
            raise BadInputError(
                f"Row {index} has an empty {'response' if len(prompt) else 'prompt'}.", "Remove such rows."
            )
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index][0]) - len(rows[index][1]))
    found: dict[int, torch.Tensor] = {}
    for first in range(0, len(order), batch_size):
        picked = order[first : first + batch_size]
        ids, attention, mask = pad_rows([rows[index] for index in picked], device=device)
        values = score(ids, mask, attention).float().cpu()
        for line, index in enumerate(picked):
            prompt, response = rows[index]
            found[index] = values[line, len(prompt) : len(prompt) + len(response)].clone()
        report("scoring rows", min(first + batch_size, len(order)), len(order))
    return [found[index] for index in range(len(rows))]


def model_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's architecture and weights (a strided sample of every tensor, and its sum), for caches."""
    import torch

    digest = hashlib.sha256(model.config.to_json_string(use_diff=True).encode())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            flat = whole(weight.detach()).reshape(-1)
            sample = flat[:: max(1, flat.numel() // 2048)].float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}{flat.sum(dtype=torch.float64).item():.9g}".encode())
            digest.update(sample.contiguous().numpy().tobytes())
    return digest.hexdigest()
