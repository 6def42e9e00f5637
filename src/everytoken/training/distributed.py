"""Models over several processes: alone, under data parallel, and where FSDP holds weights in shards, by the same calls.

``accelerate launch`` says which. Under FSDP (version 2) every model lies in shards, those that only score too, and
every process takes part in every forward.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import UnsupportedModelError
from .scored_forward import add_scored_forward

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


def on_cpu() -> bool:
    """Whether training runs on CPUs: the ``use_cpu`` of training arguments, without which processes on CPUs do not know
    each other.
    """
    return not torch.accelerator.is_available()


def process_state() -> Any:
    """accelerate's state of this process, for what the launcher asked, on CPUs too.

    accelerate shards on accelerators only, though torch shards on CPUs as well, over gloo. There FSDP serves to try a
    configuration before it costs anything.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    state = PartialState(cpu=on_cpu())
    if state.distributed_type == DistributedType.MULTI_CPU and fsdp_asked():
        state.distributed_type = DistributedType.MULTI_GPU  # from here accelerate goes on as with accelerators
    return state


def fsdp_asked() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class LaunchedMixin:
    """For trainers: they meet accelerate as ``process_state`` has it (TrainingArguments make its state anew)."""

    def create_accelerator_and_postprocess(self) -> None:
        process_state()
        super().create_accelerator_and_postprocess()  # type: ignore[misc]


def in_shards() -> bool:
    """Whether the launcher asked for FSDP.

    Raises:
        UnsupportedModelError: for its first version.
    """
    if not fsdp_asked() or process_state().num_processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UnsupportedModelError(
            "FSDP version 1 is not supported.", "Set fsdp_version: 2, as in configs/accelerate/fsdp.yaml."
        )
    return True


def load_unplaced(name: str | None, **kwargs: Any) -> Any:
    """As ``load_model``; where weights will lie in shards it stays on the CPU: a device might not hold it whole."""
    from ..core.loading import load_model

    return load_model(name, device="cpu" if in_shards() else None, **kwargs)


def frozen(model: PreTrainedModel, accelerator: Accelerator | None = None) -> Any:
    """A model that only scores, where it will be used: on this process's device, or in shards. The same object.

    Args:
        accelerator: that of the trainer, where there is one already.
    """
    model.requires_grad_(False).eval()
    return shard(model, accelerator) if in_shards() else model.to(process_state().device)


def shard(model: torch.nn.Module, accelerator: Accelerator | None = None) -> Any:
    """Puts a model into shards, layer by layer; a causal model gets the forward that scores."""
    from accelerate import Accelerator
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        return model
    if hasattr(model, "get_output_embeddings"):
        add_scored_forward(model)
    return fsdp2_prepare_model(accelerator or Accelerator(), model)  # moves to the device what it keeps of it


def save_whole(trainer: Any, folder: Path) -> None:
    """Saves a trainer's model for ``from_pretrained``, gathered from its shards whatever state that checkpoints keep;
    all processes call it.
    """
    if not in_shards():
        trainer.save_model(str(folder))
        return
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder, state_dict=state)
    trainer.accelerator.wait_for_everyone()
