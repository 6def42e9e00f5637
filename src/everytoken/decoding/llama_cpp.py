"""llama.cpp beside our own arms: another engine, on the same GGUF file with the same threads.

It needs ``llama-cpp-python``, which nothing here installs. Its text need not be ours: it rounds in other ways.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..core.converted import gguf_of
from ..core.errors import BadInputError

NAME = "llama.cpp"
PEERS = ("auto", "none", NAME)
"""Values of ``--peer``: where it can run, never, or always."""


def runs_beside(peer: str, model: str | os.PathLike[str] | None) -> bool:
    """Whether llama.cpp runs beside a model.

    Raises:
        BadInputError: an unknown ``peer``, or it was asked for and cannot run.
    """
    if peer not in PEERS:
        raise BadInputError(f"There is no peer {peer!r}.", f"Use one of: {', '.join(PEERS)}.")
    if peer == "none":
        return False
    installed, gguf = find_spec("llama_cpp") is not None, gguf_of(model) is not None
    if peer == NAME and not installed:
        raise BadInputError("llama.cpp is not installed.", "Install it with: pip install llama-cpp-python")
    if peer == NAME and not gguf:
        raise BadInputError(f"llama.cpp reads GGUF files, and {model} is none.", "Leave --peer out.")
    return installed and gguf


@dataclass
class LlamaCpp:
    """llama.cpp with a model loaded.

    Args:
        path: the GGUF file.
        context: tokens of prompt and answer, at most.
        threads: for prompts and for single tokens.
    """

    path: Path
    context: int
    threads: int
    ends: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        from llama_cpp import Llama

        self._llama: Any = Llama(
            str(self.path), n_ctx=self.context, n_threads=self.threads, n_threads_batch=self.threads, verbose=False
        )

    @property
    def note(self) -> str:
        """A sentence for output."""
        try:
            known = f"llama-cpp-python {version('llama-cpp-python')}"
        except PackageNotFoundError:
            known = "llama-cpp-python"
        return f"{NAME} ({known}) is another engine: the same GGUF file, {self.threads} thread(s); its text may differ."

    def decode(self, prompt: Sequence[int], new_tokens: int, temperature: float = 0.0) -> tuple[list[int], float]:
        """At most ``new_tokens`` after the prompt's ids, and the seconds that they took, the prompt's among them."""
        began, new = time.perf_counter(), list[int]()
        self._llama.reset()
        wanted = dict(temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        for token in self._llama.generate(list(prompt), **wanted):
            new.append(int(token))
            if new[-1] in self.ends or new[-1] == self._llama.token_eos() or len(new) == new_tokens:
                break
        return new, time.perf_counter() - began
