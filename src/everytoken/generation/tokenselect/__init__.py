"""TokenSelect (arXiv 2411.02886): the decoder, its cache, and the attention over a selection of cached tokens."""

from __future__ import annotations

from .attention import Rotation, TokenSelectStats, find_rotary, select, token_select_attention, votes
from .cache import TokenSelectCache, TokenSelectLayer
from .decoder import TokenSelect

__all__ = [
    "Rotation",
    "TokenSelect",
    "TokenSelectCache",
    "TokenSelectLayer",
    "TokenSelectStats",
    "find_rotary",
    "select",
    "token_select_attention",
    "votes",
]
