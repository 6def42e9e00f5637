"""The precision in which a trainer's policy runs, for frozen models that are compared with it.

accelerate runs a prepared policy under autocast where ``bf16`` or ``fp16`` is asked for. A model that only scores must
run in the same way: equal models would differ otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import TrainingArguments


def mixed_precision(args: TrainingArguments) -> torch.autocast:
    """The autocast that ``bf16`` and ``fp16`` ask for; a context that does nothing without them."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    return torch.autocast(args.device.type, dtype=dtype, enabled=bool(args.bf16 or args.fp16))


def autocast_name() -> str:
    """The type that autocast computes in at present, or nothing: what was computed under it is another number."""
    for device in ("cuda", "xpu", "mps", "cpu"):
        if torch.is_autocast_enabled(device):
            return str(torch.get_autocast_dtype(device))
    return ""
