"""A loop over steps for small networks: AdamW, warm-up, a level, a cosine; goes on where it was cut.

The data of a step must follow from its number alone (``core.rng.derive_seed``). Then a run that was cut and taken up
again ends with the weights of an unbroken one.

The batch of a step may come in parts. Each part is then computed by a thread of its own, forward and backward: small
tensors keep two cores busy so, where torch's own threads would wait for each other after every operation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import nn

from ..core.errors import BadInputError
from ..core.files import write_whole
from ..core.progress import Report, silent

Loss = Callable[[int], torch.Tensor]
"""The loss of a step, from its number; its gradient reaches the trained weights."""
Gradients = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class Stage:
    """One stage of a training.

    Args:
        name: for progress and the checkpoint's file.
        steps: how many.
        lr: the level.
        warmup: share of the steps that it takes to get there.
        hold: share of the steps after which the level falls, by a cosine to zero.
        betas, weight_decay: of AdamW.
        clip: the gradient's norm is cut to this.

    Raises:
        BadInputError: a value out of range.
    """

    name: str
    steps: int
    lr: float
    warmup: float = 0.01
    hold: float = 0.6
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr <= 0 or self.clip <= 0 or self.weight_decay < 0:
            raise BadInputError(
                f"The stage {self.name} needs steps and a weight decay of 0 or more, and a positive lr and clip; got "
                f"{self.steps}, {self.weight_decay}, {self.lr} and {self.clip}."
            )
        if not 0 <= self.warmup <= self.hold <= 1:
            raise BadInputError(
                f"The stage {self.name} warms up before its level falls; got shares of {self.warmup} and {self.hold}."
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising, falls = self.warmup * self.steps, self.hold * self.steps
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        if step < falls or falls >= self.steps:
            return self.lr
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - falls) / (self.steps - falls)))


def fit(
    model: nn.Module,
    loss: Loss | Sequence[Loss],
    stage: Stage,
    folder: Path | None = None,
    report: Report = silent,
    weights: Sequence[nn.Parameter] | None = None,
    save_every: int = 200,
    identity: str = "",
) -> list[tuple[int, float]]:
    """Trains a model for one stage.

    Args:
        model: its state dict is kept in checkpoints.
        loss: called once a step, in training mode; or the losses of equal parts of the batch, whose mean counts.
        stage: steps and rates.
        folder: where the stage's checkpoint lies; None keeps none. A finished stage is only read.
        report: called with the stage, steps done and their number.
        weights: what learns; None takes all that require a gradient.
        save_every: a checkpoint after so many steps.
        identity: what the training is of (``fingerprint`` of settings and a batch): a checkpoint of another is refused.

    Returns:
        The loss's curve: ``(step, mean over the steps since the last point)``, 50 points at most.

    Raises:
        BadInputError: the loss stopped being a number; or the checkpoint is of another model, stage or identity.
    """
    learned = [item for item in model.parameters() if item.requires_grad] if weights is None else list(weights)
    optimizer = torch.optim.AdamW(learned, lr=stage.lr, betas=stage.betas, weight_decay=stage.weight_decay)
    file = None if folder is None else folder / f"{stage.name}.checkpoint"
    start, curve = _restored(file, stage, model, optimizer, identity)
    every, sums, began = max(1, stage.steps // 50), [0.0, 0.0], time.time()
    parts = [loss] if callable(loss) else list(loss)
    threads = ThreadPoolExecutor(len(parts))
    model.train()
    for step in range(start, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.rate(step)
        if len(parts) == 1:
            found = [_gradients(parts[0], step, learned)]
        else:
            found = list(threads.map(lambda part, step=step: _gradients(part, step, learned), parts))
        value = sum(item for item, _ in found) / len(parts)
        if not math.isfinite(value):
            raise BadInputError(f"The loss of {stage.name} is {value} at step {step}.", "Lower the learning rate.")
        for weight, *all_parts in zip(learned, *(gradients for _, gradients in found), strict=True):
            there = [gradient for gradient in all_parts if gradient is not None]
            weight.grad = torch.stack(there).sum(0) / len(parts) if there else None
        nn.utils.clip_grad_norm_(learned, stage.clip)
        optimizer.step()
        sums = [sums[0] + value, sums[1] + 1]
        done = step + 1
        if done % every == 0 or done == stage.steps:
            curve.append((done, sums[0] / sums[1]))
            report(f"{stage.name}, loss {curve[-1][1]:.3f}", done, stage.steps)
            sums = [0.0, 0.0]
        if file is not None and (done == stage.steps or (done % save_every == 0 and time.time() - began > 10)):
            _keep(file, stage, done, model, optimizer, curve, identity)
            began = time.time()
    threads.shutdown()
    model.eval()
    return curve


def fingerprint(*parts: object) -> str:
    """A short hash of settings and batches: numbers and texts, tensors and arrays by their values, and dataclasses,
    mappings and sequences of them. How often a training is kept (``save_every``) does not count.
    """
    found = hashlib.sha256()

    def take(item: object) -> None:
        if isinstance(item, torch.Tensor):
            item = item.detach().float().cpu().numpy()
        if isinstance(item, np.ndarray):
            found.update(f"{item.dtype}{item.shape}".encode() + np.ascontiguousarray(item).tobytes())
        elif isinstance(item, Mapping):
            for key in sorted(item, key=str):
                found.update(f"{key}:".encode())
                take(item[key])
        elif isinstance(item, list | tuple):
            found.update(f"{len(item)}[".encode())
            for part in item:
                take(part)
        elif dataclasses.is_dataclass(item) and not isinstance(item, type):
            found.update(type(item).__name__.encode())
            names = [part.name for part in dataclasses.fields(item) if part.name != "save_every"]
            take({name: getattr(item, name) for name in names})
        else:
            found.update(repr(item).encode())

    take(parts)
    return found.hexdigest()[:16]


def _gradients(loss: Loss, step: int, weights: Sequence[nn.Parameter]) -> tuple[float, Gradients]:
    """A part's loss and its gradients; nothing is added to the weights, which the threads share."""
    with torch.enable_grad():  # whether gradients are wanted is known to the thread that asked only
        value = loss(step)
        gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return float(value.detach()), gradients


def _keep(
    file: Path,
    stage: Stage,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    curve: list[tuple[int, float]],
    identity: str,
) -> None:
    # a finished stage needs no optimizer any more
    kept = optimizer.state_dict() if step < stage.steps else {}
    state = {"stage": repr(stage), "step": step, "model": model.state_dict(), "optimizer": kept, "curve": curve}
    state["identity"] = identity
    write_whole(file, lambda path: torch.save(state, path))


def _restored(
    file: Path | None, stage: Stage, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str
) -> tuple[int, list[tuple[int, float]]]:
    """Puts back what a checkpoint holds; the step at which to go on, and the curve so far."""
    if file is None or not file.is_file():
        return 0, []
    try:
        state = torch.load(file, weights_only=True)
        if state["stage"] != repr(stage):
            raise ValueError(f"it was written by {state['stage']}")
        if state.get("identity", identity) != identity:  # older ones have none
            raise ValueError("it was trained with other settings or on other data")
        model.load_state_dict(state["model"])
        if state["optimizer"]:
            optimizer.load_state_dict(state["optimizer"])
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise BadInputError(
            f"{file} cannot be gone on from: {error}", "Delete it, or train in another folder."
        ) from error
    return state["step"], [(int(step), float(value)) for step, value in state["curve"]]
