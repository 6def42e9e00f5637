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
    "decoder_ffn_dim": 32, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "is_decoder": True, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "sliding_window": WINDOW,
    "tie_word_embeddings": False, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "state_size": 8, "mamba_d_state": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "word_embed_proj_dim": 32,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "shared_expert_intermediate_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "num_heads": 4, "embedding_size": 32, "dim": 32, "use_cache": True,
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


LATENT: dict[str, object] = {"num_key_value_heads": 4}
MIXED = ["linear_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, object]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"),
        LATENT,
    ),
    "bailing_hybrid": LATENT | {"layer_types": MIXED},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": WINDOW},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": MIXED},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LATENT | {"layer_types": MIXED},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "xlm": {"pad_index": 0, "mask_token_id": VOCAB - 1},  # by default words of the prompts are padding to it
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family needs beside ``SIZES``."""
COMPOSITE = "reads images or sound as well: its language model is a family of its own"
STATE = "plain generate keeps its state outside of past_key_values and cannot go on from it"
EXCLUDED: dict[str, str] = {
    **dict.fromkeys(
        ("dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified",
         "gemma4_unified_assistant", "git", "got_ocr2", "hyperclovax", "llama4", "mllama", "moshi",
         "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
         "qwen4_exp", "whisper"),
        COMPOSITE,
    ),
    "blt": "reads bytes in patches, through three models in one",
    "cohere_compass_text": "its default configuration builds no model",
    "dbrx": "its default configuration builds no model",
    "falcon_h1": "the sizes of its state cannot be chosen by these fields",
    "gemma3n_text": "layers share caches in a pattern that four layers cannot have",
    "lfm2_moe": "its default configuration builds no model of four layers",
    "qwen4_exp_text": "its default configuration builds no model",
    "reformer": "its axial position embeddings have sizes of their own",
    "xlstm": "plain generate does not run with these sizes",
    "xmod": "needs a language to be chosen",
    "zamba2": "its layers are listed one by one",
}  # fmt: skip
"""Families that are not built, and why."""
