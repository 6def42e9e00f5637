"""Tiny random vision-language models of every class that can be reduced, and prompts with images for them."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

VOCAB, IMAGE, VIDEO, START, END = 40, 39, 38, 37, 36


def llama(layers=4, **more):
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None, **more,
    )  # fmt: skip


def sharpened(model):
    """Weights large enough that features matter and nothing ties."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.25 if "embed" not in name else 0.5)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model.eval()


def clip(size=32, patch=8):
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=size,
        patch_size=patch,
    )  # fmt: skip


def llava():
    config = LlavaConfig(text_config=llama(), vision_config=clip(), image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def llava_next():
    config = LlavaNextConfig(
        text_config=llama(),
        vision_config=clip(16, 4),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 32]],
    )
    return LlavaNextForConditionalGeneration(config)


def siglip_like(config_class, model_class):
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4
    )
    config = config_class(
        text_config=llama().to_dict() | {"model_type": "llama"}, vision_config=vision, image_token_id=IMAGE,
        scale_factor=2, pad_token_id=0,
    )  # fmt: skip
    return model_class(config)


def internvl():
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32],
        patch_size=[4, 4],
    )  # fmt: skip
    text = llama().to_dict() | {"model_type": "llama"}
    config = InternVLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, downsample_ratio=0.5)
    return InternVLForConditionalGeneration(config)


def qwen(config_class, model_class, **vision):
    text = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )  # fmt: skip
    vision = (
        dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, in_channels=3) | vision
    )
    config = config_class(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    return model_class(config)


BUILDERS = {
    "llava": llava,
    "llava_next": llava_next,
    "smolvlm": lambda: siglip_like(SmolVLMConfig, SmolVLMForConditionalGeneration),
    "idefics3": lambda: siglip_like(Idefics3Config, Idefics3ForConditionalGeneration),
    "internvl": internvl,
    "qwen2_vl": lambda: qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, embed_dim=32, hidden_size=32),
    "qwen2_5_vl": lambda: qwen(
        Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, hidden_size=32, out_hidden_size=32, intermediate_size=32,
        window_size=16, fullatt_block_indexes=[1],
    ),
}  # fmt: skip


@lru_cache
def tiny(name):
    torch.manual_seed(0)
    return sharpened(BUILDERS[name]())


def batch(model, prompts):
    """Left-padded ids of prompts given as lists of pieces: numbers of text tokens, and pairs (token, count)."""
    rows = []
    text = iter(range(10_000))
    for pieces in prompts:
        row = []
        for piece in pieces:
            if isinstance(piece, tuple):
                row += [piece[0]] * piece[1]
            else:
                row += [2 + next(text) * 7 % 30 for _ in range(piece)]
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def images(shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(name, model):
    """A batch of two prompts, the first with two images, the second with one and longer text; unequal where the class
    knows images of unequal size."""
    if name == "llava":
        given = batch(model, [[3, (IMAGE, 16), 2, (IMAGE, 16), 4], [2, (IMAGE, 16), 9]])
        return given | {"pixel_values": images((3, 3, 32, 32))}
    if name == "llava_next":
        sizes = torch.tensor([[32, 32], [16, 32], [20, 32]])
        features = model.model.get_image_features(
            images((3, 5, 3, 16, 16)), image_sizes=sizes, vision_feature_layer=-2,
            vision_feature_select_strategy="default", return_dict=True,
        ).pooler_output  # fmt: skip
        a, b, c = map(len, features)
        assert len({a, b, c}) == 3
        given = batch(model, [[3, (IMAGE, a), 2, (IMAGE, b), 4], [2, (IMAGE, c), 9]])
        return given | {"pixel_values": images((3, 5, 3, 16, 16)), "image_sizes": sizes}
    if name in ("smolvlm", "idefics3"):
        pixels = images((2, 2, 3, 32, 32))
        pixels[1, 1] = 0  # the second prompt has one crop
        given = batch(model, [[3, (IMAGE, 16), 2, (IMAGE, 16), 4], [2, (IMAGE, 16), 9]])
        return given | {"pixel_values": pixels}
    if name == "internvl":
        given = batch(model, [[3, (IMAGE, 16), 2, (IMAGE, 16), 4], [2, (IMAGE, 16), 9]])
        return given | {"pixel_values": images((3, 3, 32, 32))}
    grids = torch.tensor([[1, 4, 8], [1, 8, 8], [1, 4, 4]])
    videos = torch.tensor([[2, 4, 4]])
    given = batch(model, [[3, (IMAGE, 8), 2, (IMAGE, 16), 4], [2, (IMAGE, 4), 3, (VIDEO, 8), 5]])
    kinds = (given["input_ids"] == IMAGE).int() + 2 * (given["input_ids"] == VIDEO).int()
    width = 3 * 2 * 4 * 4
    return given | {
        "pixel_values": images((int(grids.prod(-1).sum()), width)),
        "image_grid_thw": grids,
        "pixel_values_videos": images((int(videos.prod(-1).sum()), width), seed=2),
        "video_grid_thw": videos,
        "mm_token_type_ids": kinds,
    }
