"""Tiny random models for tests: a real Llama of a few thousand weights, and a tokenizer of one token a character."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


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
