"""The contract of a Matcher: it follows one text and says which tokens may come next.

``Matcher`` has the methods that users of xgrammar know (``fill_next_token_bitmask``, ``accept_token``, ``rollback``,
``is_terminated``, ``find_jump_forward_string``) plus ``accepts``, which tests one token alone: samplers that draw first
and ask afterwards need no more. Every decoder takes one; the constraints station makes them.

Bitmasks are int32, ``[B, ceil(V / 32)]``; bit ``i % 32`` of word ``i // 32`` says whether token i is allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from ..core.errors import BadInputError

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Matcher(Protocol):
    """Follows one text token by token."""

    def fill_next_token_bitmask(self, bitmask: torch.Tensor, index: int = 0) -> bool:
        """Writes the allowed tokens into row ``index``; returns whether any token is forbidden."""
        ...

    def accept_token(self, token_id: int) -> bool:
        """Moves on; False (and no change) if the token is not allowed."""
        ...

    def accepts(self, token_id: int) -> bool:
        """Whether ``accept_token`` would succeed; changes nothing."""
        ...

    def rollback(self, num_tokens: int = 1) -> None:
        """Takes back the last tokens."""
        ...

    def is_terminated(self) -> bool:
        """Whether the text is finished."""
        ...

    def find_jump_forward_string(self) -> str:
        """The text that must come next, if there is only one possibility."""
        ...

    def fork(self) -> Matcher:
        """An independent matcher in the same state."""
        ...


def allocate_token_bitmask(batch_size: int, vocab_size: int) -> torch.Tensor:
    """A bitmask with every token allowed: int32 ``[B, ceil(V / 32)]``."""
    import torch

    return torch.full((batch_size, (vocab_size + 31) // 32), -1, dtype=torch.int32)


def bitmask_to_bool(bitmask: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """``[B, W]`` int32 as ``[B, V]`` bool."""
    import torch

    shifts = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    return ((bitmask[..., None] >> shifts) & 1).bool().flatten(-2)[..., :vocab_size]


def apply_token_bitmask_inplace(logits: torch.Tensor, bitmask: torch.Tensor, indices: list[int] | None = None) -> None:
    """Sets the logits of forbidden tokens to minus infinity.

    Args:
        logits: ``[B, V]`` or ``[V]``, any float type and device.
        bitmask: ``[B, W]`` or ``[W]`` int32.
        indices: rows to treat; default all.

    Raises:
        BadInputError: the bitmask has too few words for the logits, or another number of rows.
    """
    rows = logits if logits.dim() == 2 else logits[None]
    masks = bitmask if bitmask.dim() == 2 else bitmask[None]
    if masks.shape[-1] * 32 < rows.shape[-1] or masks.shape[0] != rows.shape[0]:
        raise BadInputError(
            f"A bitmask of shape {tuple(bitmask.shape)} does not fit logits of shape {tuple(logits.shape)}.",
            "Allocate it with allocate_token_bitmask(batch_size, logits.shape[-1]).",
        )
    allowed = bitmask_to_bool(masks.to(rows.device), rows.shape[-1])
    if indices is None:
        rows.masked_fill_(~allowed, float("-inf"))
    else:
        for index in indices:
            rows[index].masked_fill_(~allowed[index], float("-inf"))


def fill_mask(matcher: Matcher, scores: torch.Tensor) -> None:
    """Sets the scores ``[V]`` of tokens that a ``Matcher`` forbids to minus infinity, in place; a finished one forbids
    none."""
    if matcher.is_terminated():
        return
    bitmask = allocate_token_bitmask(1, scores.shape[-1])
    if matcher.fill_next_token_bitmask(bitmask, 0):
        apply_token_bitmask_inplace(scores, bitmask[0])
