"""Which session of a draft goes with a target: the compiled one where there is one, torch's elsewhere."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ...decoding.lean import LeanRowCache
from ...decoding.row_cache import RowCache
from .compiled_draft import CompiledSession, compiled_draft
from .drafting import DraftSession, is_feature_draft


def draft_session(draft: Any, target: PreTrainedModel, vocab: int, read_by: RowCache) -> DraftSession:
    """The fastest session of a draft with a target that reads through ``read_by``."""
    if isinstance(read_by, LeanRowCache) and is_feature_draft(draft):
        if draft._head is None or draft._target[0] is not target:
            draft.attach(target)
        compiled = compiled_draft(draft)
        if compiled is not None:
            return CompiledSession(draft, target, vocab, read_by, compiled)
    return DraftSession(draft, target, vocab, read_by)
