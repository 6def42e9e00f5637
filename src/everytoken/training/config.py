"""Typed configurations of ``everytoken train``: what every training is told, and how a method's own settings join it.

``TrainConfig`` holds the common settings. ``derive_config`` adds the fields of a method's dataclasses (its loss, the
makers of its data columns), so that a method states its settings once. YAML files and ``--set name=value`` fill the
result.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ..core.errors import BadInputError, UnknownNameError
from ..core.settings import settable
from .distributed import on_cpu

Part = TypeVar("Part")


@dataclass
class TrainConfig:
    """What every training is told.

    Args:
        steps: optimiser steps; 0 trains ``epochs`` instead.
        epochs: passes over the data.
        batch_size: rows (pairs, rollouts) a step and process; ``accumulation`` multiplies it.
        lr, warmup: peak learning rate (cosine decay), share of the steps that warm up.
        lora_r: rank of an adapter on all linear layers; 0 trains all weights.
        dtype: of the weights: float32 or bfloat16; ``bf16`` trains float32 weights under autocast.
        gradient_checkpointing: recompute activations in the backward pass.
        max_length: tokens of prompt and response; longer rows lose their end.
        eval_share: share of the rows that is held out (at least one).
        save_steps: a checkpoint every so many steps; 0 for none but the last.
        log_steps: a point of the curves every so many steps.
        report_to: where logs go besides the report: names of transformers' integrations, separated by commas
            (``tensorboard``, ``wandb``, ``mlflow``).
        samples, sample_tokens: texts before and after, and their length.
        seed: of everything.
        resume: go on from the last checkpoint in the folder.

    Raises:
        BadInputError: a value out of range.
    """

    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 4
    accumulation: int = 1
    lr: float = 5e-6
    warmup: float = 0.1
    lora_r: int = 0
    dtype: str = "float32"
    bf16: bool = False
    gradient_checkpointing: bool = False
    max_length: int = 1024
    eval_share: float = 0.1
    save_steps: int = 0
    log_steps: int = 1
    report_to: str = ""
    samples: int = 3
    sample_tokens: int = 32
    seed: int = 0
    resume: bool = True
    parts: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_steps", "max_length"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} must be at least 1; got {getattr(self, name)}.")
        for name in ("steps", "save_steps", "samples", "lora_r"):
            if getattr(self, name) < 0:
                raise BadInputError(f"{name} must not be negative; got {getattr(self, name)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise BadInputError(f"Unknown dtype {self.dtype!r}.", "Use float32 or bfloat16.")
        if not 0 < self.eval_share < 1:
            raise BadInputError(f"eval_share lies between 0 and 1; got {self.eval_share}.")
        check_integrations(self.integrations)
        for kind in self.parts:
            self.part(kind)  # its own checks, before anything is loaded

    @property
    def integrations(self) -> list[str]:
        """The names in ``report_to``."""
        return [name.strip() for name in self.report_to.split(",") if name.strip()]

    def part(self, kind: type[Part]) -> Part:
        """A dataclass, with what this configuration carries of its settings; other fields keep their defaults."""
        carried = {item.name for item in dataclasses.fields(self)}
        names = [item.name for item in dataclasses.fields(typing.cast(Any, kind)) if item.init]
        return kind(**{name: getattr(self, name) for name in names if name in carried})

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of any transformers trainer."""
        return dict(
            output_dir=str(folder),
            use_cpu=on_cpu(),
            report_to=self.integrations,
            logging_steps=self.log_steps,
            save_strategy="steps" if self.save_steps else "no",
            save_steps=self.save_steps or 1,
            save_total_limit=2,
            bf16=self.bf16,
            gradient_checkpointing=self.gradient_checkpointing,
            disable_tqdm=True,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            max_steps=self.steps or -1,
            num_train_epochs=self.epochs,
            learning_rate=self.lr,
            lr_scheduler_type="cosine",
            warmup_steps=self.warmup,  # a share, where it is below 1
            seed=self.seed,
            data_seed=self.seed,
        )


def check_integrations(names: list[str]) -> None:
    """Refuses a name that transformers does not know, and one whose library is not installed.

    Raises:
        UnknownNameError, BadInputError: such a name.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UnknownNameError("integration for report_to", name, INTEGRATION_TO_CALLBACK)
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise BadInputError(f"Logs cannot go to {name}: {error}", "Install it, or leave it out.") from error


Config = TypeVar("Config", bound=TrainConfig)


def derive_config(name: str, base: type[Config], *parts: type) -> type[Config]:
    """A configuration with the fields of ``base`` and of a method's dataclasses.

    Building one builds, and so checks, every part. Settings that cannot be given as text (functions, models) keep the
    defaults of their part.

    Args:
        name: of the new class.
        base: ``TrainConfig``, or a station's dataclass derived from it.
        parts: dataclasses of settings, each named once.

    Raises:
        TypeError: a part is no dataclass, needs something that cannot be given as text, or has a setting that is there
            already.
    """
    found: dict[str, tuple[str, Any, Any]] = {}
    taken = {item.name: base.__name__ for item in dataclasses.fields(base)}
    for part in parts:
        if not dataclasses.is_dataclass(part):
            raise TypeError(f"{part.__name__} is no dataclass, so it declares no settings.")
        hints, simple = typing.get_type_hints(part), settable(part)
        for item in dataclasses.fields(part):
            if not item.init:
                continue
            if item.name not in simple:
                if item.default is item.default_factory:  # both missing
                    raise TypeError(f"{part.__name__} needs {item.name}, which cannot be given as text.")
                continue
            if item.name in taken:
                raise TypeError(f"The setting {item.name} of {part.__name__} is one of {taken[item.name]} already.")
            taken[item.name] = part.__name__
            copied = dataclasses.field(
                default=item.default, default_factory=item.default_factory, metadata=item.metadata, kw_only=True
            )  # type: ignore[call-overload]
            found[item.name] = (item.name, hints[item.name], copied)
    title = f"{name}: the settings of {', '.join(kind.__name__ for kind in (base, *parts))}; each is described there."
    made = dataclasses.make_dataclass(
        name, list(found.values()), bases=(base,), namespace={"__doc__": title, "parts": parts}
    )
    made.__module__ = base.__module__
    return typing.cast("type[Config]", made)
