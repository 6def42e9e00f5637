"""Trials of constraints: plain decoding and each method on the same prompt."""

from __future__ import annotations

from ..decoding.trial import TrialRequest, TrialResult, run_decoders

EXAMPLE = "Describe a person as JSON with a name, an age and a list of hobbies."


def trial(request: TrialRequest) -> TrialResult:
    """Runs plain decoding, then every method; see ``decoding.trial``."""
    return run_decoders(request, EXAMPLE)
