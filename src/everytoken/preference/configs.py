"""Typed configurations of ``everytoken train`` for this station: what every training is told, and what each loss adds.

``configs/train/*.yaml`` hold the papers' settings for them; ``--set name=value`` changes one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..core.errors import BadInputError
from ..reinforcement.rto import RTOSettings
from ..training.distributed import on_cpu
from .cdpo import CDPOLoss
from .dpo import DPOLoss
from .guides import GuideSettings
from .ift import IFTSettings
from .t_reg import TREGLoss
from .tdpo import TDPOLoss
from .tgdpo import TGDPOLoss


@dataclass
class Common:
    """What every training of this station is told.

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
        samples, sample_tokens: texts before and after, and their length.
        seed: of everything.
        resume: go on from the last checkpoint in the folder.
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
    samples: int = 3
    sample_tokens: int = 32
    seed: int = 0
    resume: bool = True

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

    def arguments(self, folder: Path) -> dict[str, Any]:
        """Arguments of any transformers trainer."""
        return dict(
            output_dir=str(folder),
            use_cpu=on_cpu(),
            report_to=[],
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


@dataclass
class PreferenceTraining(Common):
    """Training on pairs.

    Args:
        beta: strength of the pull towards the reference.
        precompute_reference: score the reference once, before training, and do not hold it (not with losses that need its distributions).
        monitor_kl: log the KL to the reference on the pairs.
    """

    beta: float = 0.1
    precompute_reference: bool = False
    monitor_kl: bool = True
    loss_class: ClassVar[type] = DPOLoss

    def loss(self) -> Any:
        """The loss with the settings of its name."""
        names = {item.name for item in dataclasses.fields(self.loss_class)}
        return self.loss_class(**{name: value for name, value in vars(self).items() if name in names})

    def guide_settings(self) -> GuideSettings:
        names = {item.name for item in dataclasses.fields(GuideSettings)}
        values = {name: value for name, value in vars(self).items() if name in names - {"steps", "lr"}}
        extra = {"steps": getattr(self, "guide_steps", 50), "lr": getattr(self, "guide_lr", self.lr)}
        return GuideSettings(**values | extra)


@dataclass
class TDPOTraining(PreferenceTraining):
    """TDPO on pairs; with alpha 0, DPO.

    Args:
        alpha, variant: see ``TDPOLoss``.
    """

    alpha: float = 0.5
    variant: str = "tdpo2"
    loss_class: ClassVar[type] = TDPOLoss


@dataclass
class TGDPOTraining(PreferenceTraining):
    """TGDPO on pairs.

    Args:
        alpha, clamp: see ``TGDPOLoss``.
        guide: hub id or folder of a DPO- or SimPO-trained copy; None trains one first, for ``guide_steps`` at ``guide_lr``.
    """

    alpha: float = 0.5
    clamp: float | None = None
    guide: str | None = None
    guide_steps: int = 50
    guide_lr: float = 5e-6
    loss_class: ClassVar[type] = TGDPOLoss


@dataclass
class TREGTraining(PreferenceTraining):
    """T-REG on pairs.

    Args:
        alpha, base, gamma, pair_weight, reduction: see ``TREGLoss``.
        better, worse: the two instructions; None for the module's own.
    """

    alpha: float = 0.25
    base: str = "dpo"
    gamma: float = 0.5
    pair_weight: str = "dpo"
    reduction: str = "sum"
    better: str | None = None
    worse: str | None = None
    loss_class: ClassVar[type] = TREGLoss


@dataclass
class CDPOTraining(PreferenceTraining):
    """cDPO on pairs of correct and incorrect traces.

    Args:
        weight_chosen, label_smoothing: see ``CDPOLoss``.
        positive, negative: hub ids or folders of p+ and p-; None tunes them on chosen and rejected responses, for ``guide_steps`` steps at
            ``tune_lr`` (LoRA of rank ``guide_lora_r``; 0 for all weights).
        contrast: a, how strongly p- is subtracted.
    """

    weight_chosen: bool = False
    label_smoothing: float = 0.0
    positive: str | None = None
    negative: str | None = None
    contrast: float = 1.0
    guide_steps: int = 50
    tune_lr: float = 3e-4
    guide_lora_r: int = 8
    loss_class: ClassVar[type] = CDPOLoss

    def guide_settings(self) -> GuideSettings:
        return dataclasses.replace(super().guide_settings(), lora_r=self.guide_lora_r)


@dataclass
class IFTTraining(Common, IFTSettings):
    """IFT on demonstrations (``prompt`` and ``completion``, ``messages``, or the chosen side of pairs); see ``IFTSettings``."""

    def __post_init__(self) -> None:
        Common.__post_init__(self)
        IFTSettings.__post_init__(self)


@dataclass
class RTOTraining(Common, RTOSettings):
    """RTO on prompts; see ``RTOSettings``.

    Args:
        reward: ``sentiment`` (VADER), or ``module:function`` of TRL's form ``(prompts, completions, **columns) -> list of numbers``.
        dpo: hub id or folder of the DPO-trained model; None trains one first on the data's pairs, for ``guide_steps`` at ``guide_lr``.
        num_generations: rollouts a prompt; ``batch_size`` counts rollouts.
        num_iterations: PPO's passes over a batch of rollouts.
    """

    batch_size: int = 16
    lr: float = 1e-5
    reward: str = "sentiment"
    dpo: str | None = None
    guide_steps: int = 50
    guide_lr: float = 5e-6
    num_generations: int = 8
    num_iterations: int = 1

    def __post_init__(self) -> None:
        Common.__post_init__(self)
        RTOSettings.__post_init__(self)
        if self.batch_size % self.num_generations:
            raise BadInputError(
                f"batch_size={self.batch_size} is no multiple of num_generations={self.num_generations}."
            )


def part(settings: Any, kind: type) -> Any:
    """The settings of ``kind`` that a configuration carries."""
    return kind(**{item.name: getattr(settings, item.name) for item in dataclasses.fields(kind)})
