"""What a recipe decides about a group of rollouts, token by token, for reports: traces, and pictures of the pieces."""

from __future__ import annotations

import copy
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from ..core.trace import TokenTrace
from .rollouts import Row, Watch, rollouts_of

if TYPE_CHECKING:
    from transformers import LogitsProcessor, PreTrainedTokenizerBase

    from .trainer import RecipeTrainer


def group_pictures(
    trainer: RecipeTrainer, row: Row, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[TokenTrace], dict[str, str]]:
    """Rollouts of one prompt as training would make and judge them, on one process; nothing is trained.

    Every trace has ``advantage`` (weights included) and ``entropy`` (in nats), and what the recipe decides beside them:
    ``weight``, ``temperature`` of sampling, the ratios ``clip_from`` and ``clip_to`` between which a token still
    learns, and ``trained``.

    Args:
        row: of the data.

    Returns:
        A trace a rollout that is not empty, and title -> HTML: the prompt, and what pieces draw.
    """
    count, recipe = trainer.num_generations, trainer.recipe
    sampling = recipe.one("temperature")
    processor = None if sampling is None else sampling.processor()  # as it is while these rollouts are written
    logged = {key: list(values) for key, values in trainer._metrics["train"].items()}
    if not hasattr(trainer, "current_gradient_accumulation_steps"):  # no step was left to train
        trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    trainer._watch = watch = Watch()
    try:
        with torch.no_grad():
            batch = trainer._generate_and_score_completions([copy.copy(row) for _ in range(count)])
            trainer._compute_loss(trainer.model, batch)  # its forward shows entropies, bounds and ratio weights
            degrees = None if processor is None else temperatures(trainer, batch, processor)
    finally:
        trainer._watch = None
        trainer._metrics["train"].clear()
        trainer._metrics["train"].update(logged)
    traces = _traces(trainer, batch, watch, degrees, tokenizer)
    asked = tokenizer.decode(batch["prompt_ids"][0][batch["prompt_mask"][0].bool()])
    pictures = {"Rollouts of one prompt": f'<p class="text">{escape(asked)}</p>'}
    if watch.batch is not None:
        texts = [
            TokenTrace(ids[mask].tolist()).with_text(tokenizer).labels
            for ids, mask in zip(watch.batch.ids, watch.batch.mask, strict=True)
        ]
        for piece in recipe.pieces:
            if hasattr(piece, "picture"):
                pictures |= piece.picture(watch.batch, texts)
    return traces, pictures


def _traces(
    trainer: RecipeTrainer,
    batch: dict[str, Any],
    watch: Watch,
    degrees: torch.Tensor | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[TokenTrace]:
    recipe, seen, mask = trainer.recipe, watch.columns, batch["completion_mask"].bool()
    advantages = batch["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand(mask.shape)
    columns: dict[str, torch.Tensor] = {"advantage": advantages * seen["ratio_weight"]}
    if recipe.of("token_weight", "ratio_weight"):
        columns["weight"] = seen["ratio_weight"] * seen.get("weight", torch.ones_like(seen["ratio_weight"]))
    columns["entropy"] = seen["entropy"]
    if degrees is not None:
        columns["temperature"] = degrees
    if recipe.one("clip") is not None:
        columns |= {"clip_from": 1 - seen["low"], "clip_to": 1 + seen["high"]}
    chosen = seen["kept"] if recipe.of("rollouts", "tokens") else None
    rewards = trainer.sequence_rewards().tolist()
    traces = []
    for number in range(len(mask)):
        own = mask[number]
        ids = batch["completion_ids"][number][own].tolist()
        if not ids:
            continue
        reward = "none" if rewards[number] != rewards[number] else f"{rewards[number]:.4g}"
        trace = TokenTrace(ids, title=f"Rollout {number + 1}, reward {reward}", station="reinforcement")
        for name, values in columns.items():
            trace.add(name, values[number][own].float().cpu())
        if chosen is not None:
            trace.add("trained", ["trained" if kept else "left out" for kept in chosen[number][own].tolist()])
        traces.append(trace.with_text(tokenizer))
    return traces


def temperatures(trainer: RecipeTrainer, batch: dict[str, Any], processor: LogitsProcessor) -> torch.Tensor:
    """The temperature at which each token of a batch is sampled, ``[B, T]``: by how much a processor narrows the range
    of the logits, times the temperature of all tokens.
    """
    rollouts, base = rollouts_of(batch), float(trainer.temperature)
    found = torch.empty(rollouts.mask.shape)
    width, length = rollouts.ids.shape[1], rollouts.length
    places = torch.arange(width, device=rollouts.ids.device)
    for number in range(len(found)):  # one row at a time: a row's logits are [T, V]
        logits = trainer._distributions(rollouts, torch.tensor([number]))[1][0] * base
        ahead = torch.arange(length, 0, -1, device=places.device)[:, None]
        before = rollouts.ids[number][(places - ahead).clamp(min=0)]  # what stands in front, padded on the left
        narrowed = processor(before, logits.clone())  # type: ignore[arg-type]
        found[number] = (base * _range(logits) / _range(narrowed).clamp(min=1e-9)).cpu()
    return found


def _range(scores: torch.Tensor) -> torch.Tensor:
    finite = scores.isfinite()
    high = scores.masked_fill(~finite, -torch.inf).amax(-1)
    return high - scores.masked_fill(~finite, torch.inf).amin(-1)
