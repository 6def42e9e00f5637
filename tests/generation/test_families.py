"""Decoders that reach into a model, on several families of transformers."""

from __future__ import annotations

import pytest
import torch

from everytoken.generation.skipdecode import LinearDepth, SkipDecode, skip_layers
from everytoken.generation.tokenselect import TokenSelect

SIZES = dict(
    vocab_size=29,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 3},
    "Cohere2": {"sliding_window": 5, "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}},
    "Olmo2": {},
    "Granite": {},
    "Mixtral": {"sliding_window": None, "num_local_experts": 2},
}


def build(family):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def logits_of(model, decoder, prompt):
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, custom_generate=decoder,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return output.sequences, torch.stack(output.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_selected_is_full_attention(family):
    model, prompt = build(family), torch.randint(1, 29, (2, 20), generator=torch.Generator().manual_seed(1))
    decoder = TokenSelect(top_k=0, n_init=0, n_local=64, chunk_size=64)
    ours, theirs = logits_of(model, decoder, prompt), logits_of(model, None, prompt)
    assert torch.allclose(ours[1], theirs[1], atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_selection_runs_in_cached_steps(family):
    model, prompt = build(family), torch.randint(1, 29, (2, 20), generator=torch.Generator().manual_seed(1))
    decoder = TokenSelect(top_k=4, n_init=2, n_local=6, chunk_size=6)
    sequences, logits = logits_of(model, decoder, prompt)
    assert sequences.shape == (2, 28)
    assert logits.isfinite().all()
    assert family == "Mistral" or decoder.attended < decoder.available  # windows are left alone


@pytest.mark.parametrize("family", FAMILIES)
def test_skipped_layers_in_cached_steps_equal_the_masked_full_forward(family):
    model, prompt = build(family), torch.randint(1, 29, (2, 7), generator=torch.Generator().manual_seed(1))
    schedule = LinearDepth(5, 2, 1, 6)
    sequences, logits = logits_of(model, SkipDecode(schedule), prompt)
    labels = sequences.clone()
    labels[:, :7] = -100
    with skip_layers(model, schedule), torch.no_grad():
        whole = model(input_ids=sequences, labels=labels).logits
    for step in range(8):
        assert torch.allclose(whole[:, 6 + step], logits[step], atol=1e-4)
