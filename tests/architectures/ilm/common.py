"""Tiny insertion models for tests."""

from __future__ import annotations

import torch

from everytoken.architectures.ilm.configuration_ilm import InsertionLMConfig
from everytoken.architectures.ilm.modeling_ilm import InsertionLM

PAD, MASK, CLS, BOS, A, B, C = range(7)
START = torch.tensor([[CLS, BOS]])


def network(stop=None, **settings):
    """Three letters; with ``stop`` the stop head says the same of every text."""
    torch.manual_seed(0)
    config = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.8}
    marks = {"vocab_size": 7, "mask_token_id": MASK, "cls_token_id": CLS, "bos_token_id": BOS}
    found = InsertionLM(InsertionLMConfig(**(config | marks | settings))).eval()
    if stop is not None:
        with torch.no_grad():
            found.stop_head.weight.zero_()
            found.stop_head.bias.copy_(torch.tensor([stop, 0.0]))
    return found
