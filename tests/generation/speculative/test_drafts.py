"""The feature draft: what it reads, what it refuses, and the one that ships."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from everytoken.core.errors import EverytokenError, UnsupportedModelError
from everytoken.generation.dyspec import DySpec
from everytoken.generation.speculative import draft_folder, load_draft
from everytoken.generation.speculative.configuration_feature_draft import FeatureDraftConfig
from everytoken.generation.speculative.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap

from ...conftest import tiny_llama


def tiny_draft(target, vocab=9, seed=0):
    torch.manual_seed(seed)
    config = target.config
    draft = FeatureDraftForCausalLM(
        FeatureDraftConfig(
            hidden_size=config.hidden_size,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            vocab_size=config.vocab_size,
            target_vocab_size=config.vocab_size,
            draft_vocab_size=vocab,
            feature_layers=[1, 2],
        )
    ).eval()
    draft.draft_token_ids = torch.randperm(config.vocab_size)[:vocab].sort().values.to(torch.int32)
    return draft.attach(target)


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def pair():
    target = tiny_llama(23, seed=1)
    return target, tiny_draft(target)


def test_features_are_the_targets_hidden_states(pair):
    target, _ = pair
    ids = torch.tensor([[3, 4, 5]])
    target(ids, output_hidden_states=True)  # transformers leaves hooks of its own behind
    before = hooks(target)
    tap = FeatureTap(target, [1, 2])
    with torch.no_grad():
        states = target(ids, output_hidden_states=True).hidden_states
    assert torch.equal(tap.last, torch.cat([states[1], states[2]], -1))
    tap.remove()
    assert hooks(target) == before


def test_cached_steps_equal_one_pass(pair):
    _, draft = pair
    ids, features = torch.tensor([[3, 4, 5, 6, 7]]), torch.randn(1, 5, 32)
    with torch.no_grad():
        whole = draft(ids, features=features).logits
        cache, parts = DynamicCache(), []
        for i in range(5):
            parts.append(draft(ids[:, i : i + 1], features=features[:, i : i + 1], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)


def test_reduced_logits_are_the_full_ones_of_the_drafts_vocabulary(pair):
    _, draft = pair
    ids, features = torch.tensor([[3, 4]]), torch.randn(1, 2, 32)
    with torch.no_grad():
        full = draft(ids, features=features).logits
        reduced = draft(ids, features=features, reduced_logits=True).logits
    known = draft.draft_token_ids.long()
    assert torch.equal(full[..., known], reduced)
    others = torch.ones(23, dtype=torch.bool)
    others[known] = False
    assert torch.softmax(full, -1)[..., others].sum() == 0


@pytest.mark.parametrize("threshold", [None, 0.05])
@pytest.mark.parametrize("sampling", [False, True])
def test_lossless_with_dyspec(pair, threshold, sampling):
    target, draft = pair
    decoder = DySpec(draft, budget=6, threshold=threshold)
    prompt = torch.tensor([[3, 5, 8]])
    output = target.generate(prompt, max_new_tokens=20, do_sample=sampling, custom_generate=decoder)
    assert output.shape == (1, 23)
    assert decoder.stats.proposed > 0
    if not sampling:
        assert output.tolist() == target.generate(prompt, max_new_tokens=20, do_sample=False).tolist()


def test_following_the_target_gives_the_features_that_dyspec_gives(pair):
    """As `assistant_model`, the draft finds the target's states by position: same logits as if it were handed them."""
    target, draft = pair
    ids = torch.tensor([[3, 4, 5, 6]])
    target(ids, output_hidden_states=True)
    before = hooks(target)
    draft.attach(target, follow=True)
    with torch.no_grad():
        states = target(ids, output_hidden_states=True, use_cache=True).hidden_states
        features = torch.cat([states[1], states[2]], -1)
        shifted = torch.cat([torch.zeros_like(features[:, :1]), features[:, :-1]], 1)
        followed = draft(ids).logits
        draft.detach_target()
        draft.attach(target)
        handed = draft(ids, features=shifted).logits
    assert torch.allclose(followed, handed, atol=1e-5)
    expected = target.generate(ids, max_new_tokens=16, do_sample=False)
    draft.attach(target, follow=True)
    actual = target.generate(ids, max_new_tokens=16, do_sample=False, assistant_model=draft)
    draft.detach_target()
    assert actual.tolist() == expected.tolist()
    assert hooks(target) == before


def test_errors(pair, tmp_path):
    target, draft = pair
    with pytest.raises(ValueError, match="everytoken train dyspec"):
        draft.attach(tiny_llama(31))
    draft.detach_target()
    with pytest.raises(RuntimeError, match="attach"):
        draft(torch.tensor([[1]]))
    draft.attach(target)
    with pytest.raises(ValueError, match="padding"):
        draft(torch.tensor([[1, 2]]), attention_mask=torch.tensor([[0, 1]]))
    with pytest.raises(UnsupportedModelError, match="No draft model ships"):
        load_draft(target)
    with pytest.raises(EverytokenError, match="holds no draft"):
        load_draft(target, tmp_path)


def test_saved_and_loaded(pair, tmp_path):
    target, draft = pair
    draft.save_pretrained(tmp_path)
    again = load_draft(target, tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, draft(ids).logits, atol=1e-5)


def test_the_shipped_draft():
    folder = draft_folder()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 15_000_000
    record = json.loads((folder / "training.json").read_text())
    stages = record.get("stages", [record])  # the first one was trained in two
    assert all(stage["curve"] for stage in stages)
    assert stages[-1]["held_out_agreement"][0] > 0.5
