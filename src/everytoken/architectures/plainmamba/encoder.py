"""PlainMamba in place of CLIP as the encoder of the tiny vision-language model of scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...training.vision import vlm_config
from . import modeling_plainmamba as _registers  # noqa: F401  (LLaVA finds its encoder by the Auto classes)
from .configuration_plainmamba import PlainMambaConfig

if TYPE_CHECKING:
    from transformers import LlavaConfig


def encoder_config(size: int = 64, patch: int = 8, hidden: int = 96, layers: int = 3, **settings: Any) -> LlavaConfig:
    """The tiny model's configuration with this encoder; ``training.vision.new_vlm`` makes the model.

    There is no class token to leave out, so that all features are read.

    Args:
        size, patch, hidden: as for ``training.vision.vlm_config``.
        layers: of the encoder.
        settings: of ``PlainMambaConfig``.
    """
    from transformers import LlavaConfig

    plain = vlm_config(size, patch, hidden).to_dict()
    defaults: dict[str, Any] = {"state_size": 8, "stem_channels": 16, "drop_path_rate": 0.0, "dwconv_layers": []}
    encoder = PlainMambaConfig(
        image_size=size, patch_size=patch, hidden_size=hidden, num_hidden_layers=layers, **(defaults | settings)
    )
    kept = {key: value for key, value in plain.items() if key not in ("vision_config", "model_type", "architectures")}
    return LlavaConfig(vision_config=encoder, **(kept | {"vision_feature_select_strategy": "full"}))
