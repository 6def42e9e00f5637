"""Plain text for networks that read bytes: the user's file or prose that ships with Python, in windows.

Windows of a step follow from the step's number alone, so that a training that was cut goes on with the data of an
unbroken one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import BadInputError
from ...core.rng import numpy_generator
from ...core.settings import read_text

if TYPE_CHECKING:
    import torch


def example_text() -> str:
    """English prose of about 400 kB that every Python brings: the topics of its help."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = re.sub(r"[*`^~=\-_|+#]{3,}", " ", text)  # rules and tables
    text = re.sub(r"(?<=\S)\n *(?=\S)", " ", text)  # a paragraph is a line
    return re.sub(r"[ \t]+", " ", text)


@dataclass(frozen=True)
class TextWindows:
    """The bytes of a text, the last part held out.

    Attributes:
        text: all of it.
        held_share: the share of its bytes that no training window touches.
        seed: of the draws.

    Raises:
        BadInputError: a share out of range.
    """

    text: str
    held_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_share < 1:
            raise BadInputError(f"held_share lies between 0 and 1; got {self.held_share}.")

    @classmethod
    def of(cls, file: str | None, seed: int = 0) -> TextWindows:
        """The user's file, or the example.

        Raises:
            BadInputError: no such file, or no UTF-8.
        """
        return cls(example_text() if file is None else read_text(Path(file)), seed=seed)

    @cached_property
    def _bytes(self) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return np.frombuffer(self.text.encode(), np.uint8)

    @property
    def learned(self) -> int:
        """Bytes that training windows are drawn from."""
        return int(len(self._bytes) * (1 - self.held_share))

    def check(self, length: int) -> None:
        """Refuses a text that is too short for windows of ``length`` bytes.

        Raises:
            BadInputError: fewer bytes than two windows, in the part that learns or in the part that is held out.
        """
        if min(self.learned, len(self._bytes) - self.learned) < length + 1:
            raise BadInputError(
                f"The text has {len(self._bytes):,} bytes, of which {len(self._bytes) - self.learned:,} are held out; "
                f"windows of {length} need more.",
                "Give a longer text, or a smaller length.",
            )

    def batch(self, count: int, length: int, *names: object) -> torch.Tensor:
        """Windows ``[count, length]`` of bytes 0 to 255 from the part that learns, for one named part of a run."""
        import torch

        starts = numpy_generator(self.seed, *names).integers(0, self.learned - length, count)
        return torch.from_numpy(self._bytes[starts[:, None] + np.arange(length)].astype(np.int64))

    def held(self, count: int, length: int) -> torch.Tensor:
        """The same windows ``[count, length]`` every time, evenly over the held-out part."""
        import torch

        starts = np.linspace(self.learned, len(self._bytes) - length, count).astype(int)
        return torch.from_numpy(self._bytes[starts[:, None] + np.arange(length)].astype(np.int64))
