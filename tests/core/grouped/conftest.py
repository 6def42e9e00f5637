"""A random Llama whose sizes fall into groups."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(vocab=24, seed=0, tied=False, heads=4, kv_heads=2, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=256, tie_word_embeddings=tied, bos_token_id=0,
        eos_token_id=None, pad_token_id=0, **settings,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
            else:
                weight.uniform_(0.5, 1.5)
    return model
