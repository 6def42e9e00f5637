"""Tiny random models of every causal family of ``transformers``, built from their own configurations."""

from __future__ import annotations

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 29
WINDOW = 8
SIZES: dict[str, object] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None,
    "pad_token_id": 0, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 32, "d_model": 32,
    "n_layers": 4, "n_heads": 4, "ffn_dim": 32, "decoder_layers": 4, "decoder_attention_heads": 4,
    "decoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "is_decoder": True, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "sliding_window": WINDOW,
    "tie_word_embeddings": False, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "word_embed_proj_dim": 32,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_heads": 4, "embedding_size": 32, "dim": 32,
}  # fmt: skip
"""What a configuration is told of these, if it has a field of the name."""


def build(family: str, seed: int = 0, **settings: object) -> PreTrainedModel:
    """A tiny model of a family (a ``model_type``), with weights large enough that attention matters."""
    kind = CONFIG_MAPPING[family]
    fields = set(kind().to_dict()) | set(getattr(kind, "attribute_map", {}))
    chosen = {name: value for name, value in (SIZES | FAMILIES.get(family, {})).items() if name in fields}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(kind(**chosen | settings)).eval()
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() > 1 and not name.endswith(("A_log", "conv1d.weight")):
                weight.normal_(0, 0.25)
            elif name.endswith(("sinks", "q_norm.weight", "k_norm.weight")):
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def all_families() -> list[str]:
    """Every ``model_type`` with a causal language model that is not excluded."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(EXCLUDED))


FAMILIES: dict[str, dict[str, object]] = {}
EXCLUDED: dict[str, str] = {}
