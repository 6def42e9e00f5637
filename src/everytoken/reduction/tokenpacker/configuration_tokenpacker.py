"""The shape of a TokenPacker projector."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from ...core.errors import BadInputError

QUERY_POOLS = ("bilinear", "mean")


def check_query_pool(name: str) -> None:
    """Raises BadInputError for an unknown way of making coarse points."""
    if name not in QUERY_POOLS:
        raise BadInputError(f"There is no query_pool {name!r}.", f"Known: {', '.join(QUERY_POOLS)}.")


class TokenPackerConfig(PreTrainedConfig):
    """The shape of a TokenPacker projector.

    Args:
        vision_hidden_size: C, the encoder's width.
        text_hidden_size: d, the language model's width.
        grid: g, features a side of the encoder's full grid.
        scale: s, side of the region that one token stands for; g^2 / s^2 tokens are left.
        levels: the encoder's hidden states that keys and values read, the query's level last (0 is the embedding).
        width: E, of the attention; None is C.
        num_heads: of the attention; None is one for every 128 of E, and one at least.
        query_pool: ``"bilinear"`` as in the paper, or ``"mean"`` over the whole region. At s = 3 the bilinear query is
            the centre alone, at s = 4 the four in the middle; at s = 2 both are the same.

    Raises:
        BadInputError: a value out of range, or a scale that does not divide the grid.
    """

    model_type = "tokenpacker"

    def __init__(
        self,
        vision_hidden_size: int = 1024,
        text_hidden_size: int = 4096,
        grid: int = 24,
        scale: int = 2,
        levels: tuple[int, ...] | list[int] = (12, 16, 22, 23),
        width: int | None = None,
        num_heads: int | None = None,
        query_pool: str = "bilinear",
        **kwargs: Any,
    ):
        self.vision_hidden_size, self.text_hidden_size = vision_hidden_size, text_hidden_size
        self.grid, self.scale, self.levels = grid, scale, list(levels)
        self.width = width or vision_hidden_size
        self.num_heads = num_heads or max(1, self.width // 128)
        self.query_pool = query_pool
        if min(vision_hidden_size, text_hidden_size, grid, scale, self.width, self.num_heads) < 1 or not levels:
            raise BadInputError("The sizes of a TokenPacker are 1 or more, and it reads one level at least.")
        if grid % scale:
            raise BadInputError(
                f"Regions of {scale} x {scale} do not tile a grid of {grid} x {grid}.",
                f"Take a divisor: {', '.join(str(s) for s in range(1, grid + 1) if grid % s == 0)}.",
            )
        if self.width % self.num_heads:
            raise BadInputError(f"{self.num_heads} heads do not divide a width of {self.width}.")
        check_query_pool(query_pool)
        super().__init__(**kwargs)

    @property
    def num_levels(self) -> int:
        """L, how many encoder states keys and values read."""
        return len(self.levels)

    @property
    def num_tokens(self) -> int:
        """M, tokens an image."""
        return (self.grid // self.scale) ** 2
