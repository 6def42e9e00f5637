"""Routers of R2R: a small network that says whether a small model's token should be the large model's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.errors import BadInputError
from ...core.quiet import quiet_transformers

if TYPE_CHECKING:
    from .modeling_token_router import TokenRouter


def load_router(folder: str | Path) -> TokenRouter:
    """A trained router from a folder written by ``everytoken train r2r`` (or ``save_pretrained``).

    Raises:
        BadInputError: the folder holds no router.
    """
    from safetensors import SafetensorError

    from .modeling_token_router import TokenRouter

    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise BadInputError(f"{path} holds no router (no config.json).", "Train one with: everytoken train r2r")
    try:
        with quiet_transformers():
            router: Any = TokenRouter.from_pretrained(path, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BadInputError(f"The router in {path} cannot be read: {error}", "Train it again.") from error
    return router.eval()
