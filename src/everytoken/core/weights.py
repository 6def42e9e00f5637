"""Trained weights that ship with the package, and how weights are read: from safetensors only, never from a pickle.

A shipped model is a folder of ``everytoken/weights`` with

- ``model.safetensors`` and ``config.json``,
- ``training.json``: the arguments and the curve of its training,
- ``card.toml``: what it is, its licence and origin, the script that trains it, and the model that it belongs to.

All folders together stay within ``BUDGET`` (a test adds them up), so that the wheel stays small.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import BadInputError, UnknownNameError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
BUDGET = 60_000_000
"""Bytes that all shipped weights may take together."""
SAFETENSORS = "model.safetensors"
CARD = "card.toml"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Files that may run code when they are read."""


@dataclass(frozen=True)
class Target:
    """The model that shipped weights belong to: its short name and the shape of its configuration."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether a model of this configuration has this shape."""
        text = config.get_text_config()
        return all(
            getattr(text, name, None) == getattr(self, name)
            for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        )


@dataclass(frozen=True)
class ShippedWeights:
    """One folder of shipped weights.

    Attributes:
        name: of the folder.
        folder: where it is.
        kind: what it is for a method, for example ``"draft"``.
        summary, licence, origin: for people.
        script: trains it anew; relative to the repository, as is ``documentation``.
        target: the model that it belongs to.
    """

    name: str
    folder: Path
    kind: str
    summary: str
    licence: str
    origin: str
    script: str
    documentation: str
    target: Target

    @property
    def size(self) -> int:
        """Bytes of all files of the folder."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())


def list_weights() -> list[ShippedWeights]:
    """All shipped weights, by name."""
    found = []
    for path in sorted(WEIGHTS.glob(f"*/{CARD}")):
        card = tomllib.loads(path.read_text(encoding="utf-8"))
        target = Target(**card.pop("target"))
        found.append(ShippedWeights(name=path.parent.name, folder=path.parent, target=target, **card))
    return found


def weights_folder(name: str, kind: str | None = None) -> Path:
    """The folder of shipped weights.

    Args:
        name: of the folder, or (with ``kind``) the short name of the model that the weights belong to.
        kind: look among weights of this kind only.

    Raises:
        UnknownNameError: nothing of this name ships.
    """
    known = [item for item in list_weights() if kind is None or item.kind == kind]
    for item in known:
        if name == item.name or (kind is not None and name == item.target.name):
            return item.folder
    raise UnknownNameError(f"shipped {kind or 'model'}", name, [item.name for item in known])


def weights_for(config: PreTrainedConfig, kind: str) -> Path | None:
    """The folder of shipped weights of a kind that belong to a model of this configuration; None if there are none."""
    return next((item.folder for item in list_weights() if item.kind == kind and item.target.matches(config)), None)


def safetensors_file(folder: str | Path) -> Path:
    """The weights file of a folder.

    Raises:
        BadInputError: there is none; where there are pickles instead, the error says what to do with them.
    """
    path = Path(folder).expanduser() / SAFETENSORS
    if not path.is_file():
        check_no_pickle(path.parent)
        raise BadInputError(f"{path.parent} holds no {SAFETENSORS}.", "Save the weights there with save_pretrained().")
    return path


def check_no_pickle(folder: Path) -> None:
    """Refuses a folder whose only weights are pickles, which may run any code when they are read.

    Raises:
        BadInputError: there are ``.bin``, ``.pt``, ``.pth``, ``.ckpt`` or ``.pkl`` files, and no safetensors.
    """
    if not folder.is_dir() or any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json")):
        return
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise BadInputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which may run any code when it is read.",
            "If you trust the file, convert it once: load it with transformers elsewhere and save_pretrained(), which "
            "writes safetensors.",
        )


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's ``model.safetensors``.

    Raises:
        BadInputError: there is no such file, or it cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = safetensors_file(folder)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read: {error}", "Save it anew.") from error
