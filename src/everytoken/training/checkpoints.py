"""Checkpoints that are whole: a folder that was cut off while it was written is skipped, and the one before goes on.

Trainers write ``trainer_state.json`` last, so a checkpoint without it is half-written. Files that were cut short are
found from their own tables of contents, without reading the weights.
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from ..core.errors import BadInputError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "pytorch_model_fsdp_*", "global_step*")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


def newest_whole(folder: Path, also: Sequence[str] = ()) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder, and a sentence for every newer one that was skipped.

    Args:
        folder: where ``checkpoint-N`` lie; it need not exist.
        also: names of further files that a checkpoint of this trainer has.
    """
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _numbered(path))]
    skipped: list[str] = []
    for _, path in sorted(found, reverse=True):
        why = defect(path, also)
        if why is None:
            return path, skipped
        skipped.append(f"Skipped {path}: {why}.")
    return None, skipped


def _numbered(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name) if path.is_dir() else None


def defect(checkpoint: Path, also: Sequence[str] = ()) -> str | None:
    """What a checkpoint lacks, as the end of a sentence; None where it is whole."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "it has no trainer_state.json, which is written last"
    except (OSError, ValueError):
        return "its trainer_state.json cannot be read"
    for patterns, what in ((WEIGHTS, "weights"), (OPTIMIZERS, "optimizer state")):
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            return f"it has no {what}"
    for name in also:
        if not (checkpoint / name).is_file():
            return f"it has no {name}"
    for index in checkpoint.glob("*.index.json"):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError):
            return f"its {index.name} cannot be read"
        if missing := sorted(name for name in names if not (checkpoint / name).is_file()):
            return f"it has no {missing[0]}"
    for path in sorted(checkpoint.iterdir()):
        if path.suffix == ".safetensors" and not _safetensors_whole(path):
            return f"its {path.name} was cut off"
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"its {path.name} was cut off"
        sharded = path.is_dir() and path.name.startswith(("pytorch_model_fsdp", "optimizer_"))
        if sharded and not (path / ".metadata").is_file():
            return f"its {path.name} was cut off"
    return None


def _safetensors_whole(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            return False
        try:
            header = json.loads(file.read(size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError):
            return False
    return path.stat().st_size == 8 + size + max(ends, default=0)


class ResumingMixin:
    """For trainers: ``train(resume_from_checkpoint=True)`` goes on from the newest *whole* checkpoint and warns of
    those that it skipped.
    """

    checkpoint_files: ClassVar[tuple[str, ...]] = ()
    """What a checkpoint of this trainer holds besides transformers' own files."""
    args: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As ``Trainer.train``.

        Raises:
            BadInputError: asked to go on, where no whole checkpoint is.
        """
        if resume_from_checkpoint is True:
            folder = Path(self.args.output_dir)
            whole, skipped = newest_whole(folder, self.checkpoint_files)
            for sentence in skipped:
                warnings.warn(sentence, stacklevel=2)
            if whole is None:
                raise BadInputError(
                    f"{folder} holds no whole checkpoint to go on from.", "Begin anew: resume_from_checkpoint=None."
                )
            resume_from_checkpoint = str(whole)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]
