"""Trials of this station's decoders."""

from __future__ import annotations

from ..decoding.trial import trial

__all__ = ["trial"]
