"""Tiny random models for tests: a real Llama of a few thousand weights, and a tokenizer of one token a character."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)


def tiny_llama(
    vocab: int = 11, seed: int = 0, layers: int = 2, hidden: int = 16, scale: float = 1.0, eos: int | None = None
) -> LlamaForCausalLM:
    """A random Llama with a context of 256 tokens.

    Args:
        vocab: tokens.
        seed: of the weights; torch's generator is seeded with it.
        layers, hidden: sizes.
        scale: sharpens the next-token distributions.
        eos: the end token, or None.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=eos,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
        model.lm_head.weight.mul_(3 * scale)
    return model


def tiny_llava(vocab: int = 13, **settings: Any) -> LlavaForConditionalGeneration:
    """A ``tiny_llama`` that reads images of 8 by 8 pixels, each as four tokens of the highest id.

    Args:
        vocab: tokens, the image's included.
        settings: of the Llama.
    """
    llama = tiny_llama(vocab, **settings)
    config = LlavaConfig(
        text_config=llama.config,
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        ),
        image_token_index=vocab - 1,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3)
    model.model.language_model.load_state_dict(llama.model.state_dict())
    model.lm_head.load_state_dict(llama.lm_head.state_dict())
    model.generation_config.eos_token_id = llama.config.eos_token_id
    model.generation_config.pad_token_id = 0
    return model


def tiny_tokenizer(characters: str = "abcdefghijk", end: str = "\n", pad: str = "_") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of single ASCII characters: ``end`` is token 0, ``pad`` token 1, then ``characters`` in
    order.

    All other bytes have the tokens behind those, so no text is lost; a model of ``2 + len(characters)`` tokens never
    writes them.

    Args:
        characters: what texts are made of.
        end: the end token's text.
        pad: the padding token's text; texts must not use it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    rest = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {item: index for index, item in enumerate(dict.fromkeys([end, pad, *characters, *rest]))}
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
