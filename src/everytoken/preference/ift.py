"""IFT: Intuitive Fine-Tuning (arXiv 2405.11870).

Supervised tuning scores each target token behind the ground-truth prefix, though at inference the model continues its
own. IFT trains on the same demonstrations, without pairs and without a reference, and changes two things.

*Temporal residual connection*: a first pass without gradient predicts every target token (g_t, from the logits
at t - 1); the second pass reads a mixture of the true and the predicted token, with x'_t = g_t on targets and x_t
elsewhere::

    inputs_embeds = (1 - lambda) E[x] + lambda E[x']            l_t = -log pi(x_t | mixed prefix)

*Relation propagation*: early tokens answer for what follows. Over the n target tokens of a row::

    c_t = sum_{i >= t} gamma^(i - t) l_i / n        w_t = n c_t / sum_i c_i
    loss = mean over rows of sum_t w_t l_t / n

Weights average 1; gradient flows through them, as in the authors' code (``detach_weights`` stops it); gamma = 0
switches them off. With lambda = 0 and gamma = 0 this is supervised tuning. The other propagations, side and norms are
those of the authors' code::

    settings = IFTSettings(residual=0.2, gamma=0.95)
    trainer = IFTTrainer(model, ift=settings, args=SFTConfig(...), train_dataset=rows, processing_class=tokenizer)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..core.credit import discounted_sums
from ..core.errors import BadInputError
from ..training.scored_forward import input_embeddings
from ..training.supervised import SupervisedTrainer, TargetLosses, on_targets, read_with

PROPAGATIONS = ("loss", "logps", "mask")
NORMS = ("l1", "l2", "softmax", "log")


@dataclass
class IFTSettings:
    """What IFT adds to supervised tuning.

    Args:
        residual: lambda, the share of the predicted token's embedding (0.2).
        gamma: discount of the losses that follow (0.95); 0 weights all tokens alike.
        propagation: what is summed: ``"loss"`` (l_i / n), ``"logps"`` (l_i: the same weights but for the norms softmax
            and log), ``"mask"`` (1 for every target: weights by what remains). l_i is of the mixed pass, with gradient.
        side: ``"left"`` sums what follows a token; ``"right"`` sums up to the token and turns the sum round:
            ``1 / (c_t + m)``, where m is the smallest c of the *batch* (so a row's weights depend on its neighbours).
        norm: of c (for ``"right"``, of c + m): ``"l1"``, ``"l2"`` (its square), ``"softmax"``, or ``"log"`` (of 1 + c).
            All are brought to an average of 1 afterwards.
        top_k: the predicted token is the arg-max (1), sampled among the top k, or among all (None).
        temperature: of that sampling.
        residual_warmup: share of the steps over which lambda rises linearly from 0.
        noise: standard deviation of Gaussian noise on lambda, as a share of it (one draw a step; lambda stays in
            [0, 1]).
        detach_weights: no gradient through the weights.
        reduction: ``"sequence"`` averages every row's mean; ``"token"`` averages all target tokens, as TRL's SFTTrainer
            does.

    Raises:
        BadInputError: a setting out of range.
    """

    trace_columns: ClassVar[tuple[str, ...]] = ("weight", "loss", "prediction")
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
            value += self.noise * value * torch.randn(()).item()
        return min(max(value, 0.0), 1.0)


def relation_weights(losses: torch.Tensor, mask: torch.Tensor, settings: IFTSettings) -> torch.Tensor:
    """``w_t``, ``[B, T]``: the relation weights of ``losses`` ``[B, T]``, 0 where not ``mask``.

    Rows without targets get zeros; a single target gets 1. Differentiable in ``losses``.
    """
    kept = mask.to(losses.dtype)
    if settings.gamma == 0:
        return kept
    count = kept.sum(-1, keepdim=True)
    values = kept if settings.propagation == "mask" else losses * kept
    if settings.propagation == "loss":
        values = values / count.clamp(min=1)
    if settings.side == "left":
        sums = discounted_sums(values, settings.gamma)
        shaped = {"l1": lambda: sums, "l2": sums.square, "log": sums.log1p}
    else:
        sums = discounted_sums(values.flip(-1), settings.gamma).flip(-1)
        positive = sums[mask & (sums > 0)]
        if not len(positive):
            return kept  # nothing to propagate
        sums = sums + positive.min()
        shaped = {
            "l1": sums.reciprocal, "l2": lambda: sums.square().reciprocal(), "log": lambda: sums.log1p().reciprocal(),
        }  # fmt: skip
    if settings.norm == "softmax":
        scores = sums if settings.side == "left" else sums.reciprocal()
        found = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)
    else:
        found = shaped[settings.norm]()
    found = torch.where(mask, found, 0.0)
    total = found.sum(-1, keepdim=True)
    # a row whose losses are all zero has nothing to propagate
    return torch.where(total > 0, found * count / total.clamp(min=1e-20), kept)


class IFTTrainer(SupervisedTrainer):
    """TRL's SFTTrainer with IFT's two passes.

    Args:
        ift: the settings; default the paper's.
        kwargs: as for ``trl.SFTTrainer``.

    Raises:
        BadInputError: packing or padding-free batches (a row's weights would mix with its neighbour's), or another
            loss.
        UnsupportedModelError: no input embeddings to mix.
        NonFiniteLossError: while training; the offending batch is in ``output_dir/bad_batch.json``.
    """

    _tag_names = ["everytoken", "ift"]
    _name = "IFT"

    def __init__(self, *positional: Any, ift: IFTSettings | None = None, **kwargs: Any):
        self.ift = ift or IFTSettings()
        super().__init__(*positional, **kwargs)
        input_embeddings(self.accelerator.unwrap_model(self.model))

    @property
    def reduction(self) -> str:  # type: ignore[override]
        return self.ift.reduction

    @property
    def logs_accuracy(self) -> bool:  # type: ignore[override]
        return self.ift.residual > 0 and self.ift.top_k == 1

    def token_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TargetLosses:
        """The losses of the mixed pass, their relation weights, and the first pass's predictions."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = labels[:, 1:] != -100
        kept, targets = read_with(inputs), labels[:, 1:][mask]
        progress = self.state.global_step / max(1, self.state.max_steps)
        share = self.ift.share(progress) if model.training else self.ift.residual
        score: dict[str, Any] = {"mask": mask}
        predicted, mix = ids, None
        if share > 0:
            with torch.no_grad():
                picked = model(input_ids=ids, **kept, score=score | {"pick": (self.ift.top_k, self.ift.temperature)})
            predicted = ids.clone()
            predicted[:, 1:].masked_scatter_(mask, picked)
            mix = (predicted, share)
        score |= {"labels": targets, "needs": (), "mix": mix, "aux_loss": self.aux_loss_enabled}
        stats = model(input_ids=ids, **kept, score=score)
        losses = on_targets(-stats.logps, mask)
        weights = relation_weights(losses, mask, self.ift)
        weights = weights.detach() if self.ift.detach_weights else weights
        return TargetLosses(losses, weights, mask, predicted, stats.aux_loss)
