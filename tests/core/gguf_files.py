"""A small real GGUF file: a tiny Llama in float32 with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch

from ..conftest import tiny_llama


def write_gguf(path: Path, seed: int = 0, kind: str | None = None) -> tuple[Path, torch.Tensor]:
    """Writes the file; returns its path and the input embeddings.

    Args:
        kind: of the layers' weights, for example ``Q4_1``; the head is of Q8_0 then. None: all float32.
    """
    import gguf

    from everytoken.core.vocabulary import byte_stand_ins

    names = ["<|endoftext|>", *sorted(byte_stand_ins()), "ab"]
    names += [f"<|unused{number}|>" for number in range(-len(names) % 8)]
    model = tiny_llama(len(names), seed=seed, hidden=32)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(names))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([1 if name[:2] != "<|" else 3 for name in names])
    writer.add_token_merges(["a b"])
    for role in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{role}_token_id")(0)
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for ours, theirs in inner.items()}
    for theirs, ours in tensors.items():
        values = state[f"{ours}.weight"].float().numpy()
        if kind is None or values.ndim == 1:
            writer.add_tensor(f"{theirs}.weight", values)
            continue
        stored = gguf.GGMLQuantizationType[kind if theirs.startswith("blk.") else "Q8_0"]
        writer.add_tensor(f"{theirs}.weight", gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, state["model.embed_tokens.weight"]
