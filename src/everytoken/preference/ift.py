"""IFT: Intuitive Fine-Tuning (arXiv 2405.11870).

Supervised tuning scores each target token behind the ground-truth prefix, though at inference the model continues its own. IFT trains on
the same demonstrations, without pairs and without a reference, and changes two things.

*Temporal residual connection*: a first pass without gradient predicts every target token (g_t, from the logits at t - 1); the second
pass reads a mixture of the true and the predicted token, with x'_t = g_t on targets and x_t elsewhere::

    inputs_embeds = (1 - lambda) E[x] + lambda E[x']            l_t = -log pi(x_t | mixed prefix)

*Relation propagation*: early tokens answer for what follows. Over the n target tokens of a row::

    c_t = sum_{i >= t} gamma^(i - t) l_i / n        w_t = n c_t / sum_i c_i        loss = mean over rows of sum_t w_t l_t / n

Weights average 1; gradient flows through them, as in the authors' code (``detach_weights`` stops it); gamma = 0 switches them off.
With lambda = 0 and gamma = 0 this is supervised tuning. The exact form of the propagations "logps" and "mask", of side "right" and of
the norms other than L1 is reconstructed; the default is the authors'.

    trainer = IFTTrainer(model, ift=IFTSettings(residual=0.2, gamma=0.95), args=SFTConfig(...), train_dataset=..., processing_class=...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from trl import SFTTrainer

from ..core.credit import discounted_sums
from ..core.errors import BadInputError
from ..core.logprobs import masked_sum
from ..training.distributed import LaunchedMixin
from ..training.finite_check import stopped
from ..training.scored_forward import add_scored_forward, input_embeddings

PROPAGATIONS = ("loss", "logps", "mask")
NORMS = ("l1", "l2", "softmax", "log")


@dataclass
class IFTSettings:
    """What IFT adds to supervised tuning.

    Args:
        residual: lambda, the share of the predicted token's embedding (0.2).
        gamma: discount of the losses that follow (0.95); 0 weights all tokens alike.
        propagation: what is summed: ``"loss"`` (l_i of the mixed pass, with gradient), ``"logps"`` (-log pi of the first, unmixed pass:
            constants), ``"mask"`` (1 for every target: weights by what remains).
        side: ``"left"`` sums what follows a token; ``"right"`` the total less the discounted sum of what came before (the same at gamma 1).
        norm: ``"l1"`` (weights average 1), ``"l2"`` (their mean square is 1), ``"softmax"`` (n softmax(c)), ``"log"`` (of 1 + c, then L1).
        top_k: the predicted token is the arg-max (1), sampled among the top k, or among all (None).
        temperature: of that sampling.
        residual_warmup: share of the steps over which lambda rises linearly from 0.
        noise: standard deviation of Gaussian noise on lambda (one draw a step; lambda stays in [0, 1]).
        detach_weights: no gradient through the weights.
        reduction: ``"sequence"`` averages every row's mean; ``"token"`` averages all target tokens, as TRL's SFTTrainer does.

    Raises:
        BadInputError: a setting out of range.
    """

    residual: float = 0.2
    gamma: float = 0.95
    propagation: str = "loss"
    side: str = "left"
    norm: str = "l1"
    top_k: int | None = 1
    temperature: float = 1.0
    residual_warmup: float = 0.0
    noise: float = 0.0
    detach_weights: bool = False
    reduction: str = "sequence"

    def __post_init__(self) -> None:
        known = (
            ("propagation", PROPAGATIONS),
            ("side", ("left", "right")),
            ("norm", NORMS),
            ("reduction", ("sequence", "token")),
        )
        for name, values in known:
            if getattr(self, name) not in values:
                raise BadInputError(f"Unknown {name} {getattr(self, name)!r}.", f"Use {', '.join(values)}.")
        for name in ("residual", "gamma", "residual_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name} lies in [0, 1]; got {getattr(self, name)}.")
        if self.temperature <= 0 or self.noise < 0 or (self.top_k is not None and self.top_k < 1):
            raise BadInputError("IFT needs temperature > 0, noise >= 0 and top_k >= 1 (or none).")

    def share(self, progress: float) -> float:
        """lambda after ``progress`` of training, from 0 to 1."""
        value = self.residual
        if self.residual_warmup:
            value *= min(1.0, progress / self.residual_warmup)
        if self.noise:
            value += self.noise * torch.randn(()).item()
        return min(max(value, 0.0), 1.0)


def relation_weights(losses: torch.Tensor, mask: torch.Tensor, settings: IFTSettings) -> torch.Tensor:
    """``w_t``, ``[B, T]``: the relation weights of ``losses`` ``[B, T]`` (what ``propagation`` sums), 0 where not ``mask``.

    Rows without targets get zeros; a single target gets 1. Differentiable in ``losses``.
    """
    kept = mask.to(losses.dtype)
    count = kept.sum(-1, keepdim=True)
    if settings.gamma == 0:
        return kept
    values = losses * kept
    if settings.side == "left":
        sums = discounted_sums(values, settings.gamma)
    else:
        before = discounted_sums(values.flip(-1), settings.gamma).flip(-1) - values
        sums = values.sum(-1, keepdim=True) - before
    sums = sums * kept / count.clamp(min=1)
    if settings.norm == "softmax":
        return count * torch.softmax(sums.masked_fill(~mask, -torch.inf), -1).masked_fill(~mask, 0).nan_to_num(0.0)
    if settings.norm == "log":
        sums = torch.log1p(sums)
    if settings.norm == "l2":
        return sums * count.sqrt() / sums.square().sum(-1, keepdim=True).clamp(min=1e-20).sqrt()
    total = sums.sum(-1, keepdim=True)
    # a row whose losses are all zero has nothing to propagate
    return torch.where(total > 0, sums * count / total.clamp(min=1e-20), kept)


class IFTTrainer(LaunchedMixin, SFTTrainer):
    """TRL's SFTTrainer with IFT's two passes.

    Args:
        ift: the settings; default the paper's.
        kwargs: as for ``trl.SFTTrainer``.

    Raises:
        BadInputError: packing or padding-free batches (a row's weights would mix with its neighbour's), or another loss.
        UnsupportedModelError: no input embeddings to mix.
        NonFiniteLossError: while training; the offending batch is in ``output_dir/bad_batch.json``.
    """

    _tag_names = ["everytoken", "ift"]
    _name = "IFT"

    def __init__(self, *positional: Any, ift: IFTSettings | None = None, **kwargs: Any):
        self.ift = ift or IFTSettings()
        args = kwargs.get("args", positional[1] if len(positional) > 1 else None)
        for name, allowed in (
            ("packing", False),
            ("padding_free", False),
            ("loss_type", "nll"),
            ("use_liger_kernel", False),
        ):
            if args is not None and getattr(args, name, allowed) not in (allowed, None):
                raise BadInputError(
                    f"IFTTrainer does not support {name}={getattr(args, name)}.",
                    "IFT weights whole rows by its own loss.",
                )
        super().__init__(*positional, **kwargs)
        unwrapped = self.accelerator.unwrap_model(self.model)
        input_embeddings(unwrapped)
        add_scored_forward(unwrapped)

    def token_losses(
        self, model: Any, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(l [B, T-1], weights, mask, predicted ids [B, T])`` of a batch; l and weights with gradient."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = labels[:, 1:] != -100
        kept = {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}
        targets = labels[:, 1:][mask]
        share = (
            self.ift.share(self.state.global_step / max(1, self.state.max_steps))
            if model.training
            else self.ift.residual
        )
        score: dict[str, Any] = {"mask": mask}
        first, predicted = None, ids
        wants_first = self.ift.propagation == "logps" and self.ift.gamma > 0
        with torch.no_grad():
            if share > 0:
                picked = model(input_ids=ids, **kept, score=score | {"pick": (self.ift.top_k, self.ift.temperature)})
                predicted = ids.clone()
                predicted[:, 1:].masked_scatter_(mask, picked)
            if wants_first:
                first = -model(input_ids=ids, **kept, score=score | {"labels": targets, "needs": ()}).logps
        mix = (predicted, share) if share > 0 else None
        stats = model(input_ids=ids, **kept, score=score | {"labels": targets, "needs": (), "mix": mix})

        def grid(values: torch.Tensor) -> torch.Tensor:
            return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

        losses = grid(-stats.logps)
        summed = {"loss": losses, "mask": mask.to(losses.dtype), "logps": None if first is None else grid(first)}
        source = summed[self.ift.propagation]
        weights = relation_weights(losses if source is None else source, mask, self.ift)
        return losses, weights.detach() if self.ift.detach_weights else weights, mask, predicted

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        losses, weights, mask, predicted = self.token_losses(model, inputs)
        weighted = masked_sum(weights * losses, mask)
        count = mask.sum(-1)
        if self.ift.reduction == "token":
            loss = weighted.sum() / (
                count.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            ).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        else:
            rows = (count > 0).sum().clamp(min=1)  # rows without targets teach nothing
            loss = (weighted / count.clamp(min=1)).sum() / rows
            if num_items_in_batch is not None:  # Trainer leaves accumulation to losses that take it
                loss = loss / self.current_gradient_accumulation_steps
        if not torch.isfinite(loss):
            texts = self.processing_class.batch_decode(inputs["input_ids"])
            batch = zip(texts, inputs["labels"].tolist(), weighted.detach().tolist(), strict=True)
            raise stopped(self, loss.item(), [{"text": t, "labels": y, "loss": value} for t, y, value in batch])
        self._log_tokens(losses, weights, mask, predicted, inputs)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        return loss

    def _log_tokens(
        self,
        losses: torch.Tensor,
        weights: torch.Tensor,
        mask: torch.Tensor,
        predicted: torch.Tensor,
        inputs: dict[str, Any],
    ) -> None:
        mode = "train" if self.model.training else "eval"
        right = (predicted[:, 1:] == inputs["input_ids"][:, 1:]) & mask
        sums = torch.stack(
            [losses.detach().sum(), right.sum().float(), weights.detach().amax(-1).sum(), mask.sum().float()]
        )
        total = self.accelerator.reduce(sums, reduction="sum")
        self._metrics[mode]["nll"].append((total[0] / total[3].clamp(min=1)).item())
        if self.ift.residual > 0 and self.ift.top_k == 1:
            self._metrics[mode]["mean_token_accuracy"].append((total[1] / total[3].clamp(min=1)).item())
        rows = mask.shape[0] * self.accelerator.num_processes
        self._metrics[mode]["weights/largest"].append((total[2] / rows).item())
        if mode == "train":
            self._total_train_tokens += self.accelerator.reduce(inputs["attention_mask"].sum(), reduction="sum").item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
