"""Completions as reward functions get them from TRL: texts, or conversations that end with the answer."""

from __future__ import annotations

from typing import Any

from ..training.datasets.messages import message_text


def completion_text(completion: Any) -> str:
    """A completion's text."""
    return completion if isinstance(completion, str) else message_text(completion[-1])
