"""`everytoken train dyspec`: three families, going on after a cut, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from everytoken.catalog.cards import find_card
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.generation.draft_training import DraftTraining, check_target, run
from everytoken.generation.dyspec import DySpec
from everytoken.generation.speculative import find_draft, trained_draft_folder
from everytoken.generation.speculative.answers import before_loop, kept_answers
from everytoken.generation.speculative.distillation import Row, collate, new_draft, unrolled
from everytoken.generation.speculative.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap
from everytoken.testing.models import tiny_tokenizer
from everytoken.training.base import TrainingContext
from everytoken.training.datasets.prompts import read_prompts

from ..conftest import tiny_llama
from ..decoding.families import build
from ..tiers import commit_tier

QUICK = dict(
    answers=12, max_new_tokens=16, gather=4, steps=6, batch_size=4, length=24, draft_vocab=20, evaluate_every=3, tried=1
)
PROMPTS = "abc\nbca\ncab\nfade\nbead\ncafe\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def context(tmp_path, model, out="out", report=lambda *_: None):
    folder = tmp_path / "model"
    if not folder.is_dir():
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
    data = tmp_path / "prompts.txt"
    data.write_text(PROMPTS)
    return TrainingContext(str(folder), str(data), tmp_path / out, report)


@pytest.mark.parametrize("family", commit_tier(["llama", "gpt2", "gemma3_text"], ["gpt2"]))
def test_a_draft_for_every_family(family, tmp_path, cache):
    """Learned positions, fixed embeddings of another scale, sliding windows: trained, found, used, lossless."""
    target = build(family)
    assert find_draft(target) is None
    result = run(DraftTraining(**QUICK), context(tmp_path, target))
    assert all(path.is_file() for path in result.files)
    assert {"agreement, prediction 1", "tokens a forward, draft", "share accepted, draft"} <= set(result.figures)
    assert find_draft(target) == trained_draft_folder(target)
    assert trained_draft_folder(target).is_relative_to(cache)
    prompt = torch.tensor([[3, 5, 8]])
    decoder = DySpec(threshold=None, budget=4)
    actual = target.generate(prompt, max_new_tokens=20, do_sample=False, custom_generate=decoder)
    assert isinstance(decoder.draft_model, FeatureDraftForCausalLM)
    assert decoder.stats.draft_forwards > 0
    assert actual.tolist() == target.generate(prompt, max_new_tokens=20, do_sample=False).tolist()


@pytest.mark.slow
def test_it_learns(tmp_path, cache):
    config = DraftTraining(**QUICK | dict(answers=24, steps=120, evaluate_every=20, lr=5e-3, warmup=1))
    result = run(config, context(tmp_path, tiny_llama(20, seed=1)))
    curve = json.loads((tmp_path / "out" / "training.json").read_text())["curve"]
    assert result.figures["agreement, prediction 1"] > 0.5
    assert result.figures["agreement, prediction 1"] >= curve[0]["agreement"][0]
    assert result.figures["tokens a forward, draft"] > 1.2


@pytest.mark.slow
def test_a_cut_run_goes_on_to_the_same_weights(tmp_path, cache):
    """Cut while the model answers, then while the draft learns: the weights are those of a run in one piece."""
    target, config = tiny_llama(20, seed=1), DraftTraining(**QUICK, install=False)
    run(config, context(tmp_path, target, "whole"))

    def cut(stage, done):
        def report(now, count, _total):
            if now.startswith(stage) and count >= done:
                raise KeyboardInterrupt

        return report

    for stage, done in (("the model answers", 8), ("the draft learns", 4)):
        with pytest.raises(KeyboardInterrupt):
            run(config, context(tmp_path, target, "cut", cut(stage, done)))
    result = run(config, context(tmp_path, target, "cut"))
    assert "Went on from step 3." in result.notes
    whole, again = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert set(whole) == set(again)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(list(kept_answers(tmp_path / "cut" / "answers.jsonl", _key(tmp_path / "cut")))) == 12
    assert find_draft(target) is None  # install=False


def _key(folder):
    return json.loads((folder / "answers.jsonl").read_text().splitlines()[0])["key"]


@pytest.mark.slow
def test_more_steps_go_on_and_other_settings_begin_anew(tmp_path, cache):
    target = tiny_llama(20, seed=1)
    run(DraftTraining(**QUICK), context(tmp_path, target))
    longer = run(DraftTraining(**QUICK | dict(steps=8)), context(tmp_path, target))
    assert "Went on from step 6." in longer.notes
    other = run(DraftTraining(**QUICK | dict(lr=1e-3)), context(tmp_path, target))
    assert any("began anew" in note for note in other.notes)


def test_every_dtype_of_a_model_finds_its_draft(cache):
    target, other = tiny_llama(20, seed=1), tiny_llama(20, seed=2)
    folder = trained_draft_folder(target)
    assert trained_draft_folder(tiny_llama(20, seed=1).to(torch.bfloat16)) == folder
    assert trained_draft_folder(other) != folder


def test_unrolled_steps_are_what_a_drafted_chain_computes():
    """The state at each step equals that of a chain which left the verified text as many tokens before."""
    from transformers import DynamicCache

    target = tiny_llama(23, seed=1)
    draft = new_draft(target, torch.arange(23)).eval()
    tap = FeatureTap(target, [1, 2])
    ids = [3, 5, 8, 2, 7, 1]
    batch = collate([Row(ids, 2)], target, tap, torch.arange(23), 24)
    tap.remove()
    with torch.no_grad():
        outputs = unrolled(draft, batch.ids, batch.features, 3)
        embeds = draft.get_input_embeddings()(batch.ids)
        for left in range(1, 4):  # the text is verified up to and with this position
            cache = DynamicCache()
            inputs = draft.mix_inputs(embeds[:, : left + 1], batch.features[:, : left + 1], None)
            places = torch.arange(left + 1)
            mask = (places[:, None] >= places)[None, None]
            state = draft.run_block(inputs, places[None], mask, cache)[:, -1:]
            assert torch.allclose(state[0, 0], outputs[0][0, left], atol=1e-5)
            for step in (1, 2):
                inputs = draft.mix_inputs(embeds[:, left + step : left + step + 1], None, state)
                state = draft.run_block(inputs, torch.tensor([[left + step]]), None, cache)
                assert torch.allclose(state[0, 0], outputs[step][0, left + step], atol=1e-5)


def test_the_teacher_is_the_targets_own_distribution():
    target = tiny_llama(23, seed=1)
    tap, some = FeatureTap(target, [1, 2]), torch.tensor([2, 5, 11])
    rows = [Row([3, 5, 8, 2, 7, 1], 2), Row([4, 4, 9], 1)]
    batch = collate(rows, target, tap, some, 24)
    tap.remove()
    assert batch.mask.int().tolist() == [[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    with torch.no_grad():
        alone = torch.softmax(target(torch.tensor([[4, 4, 9]])).logits[0, :2, some], -1)
    assert torch.allclose(batch.teacher[-2:], alone, atol=1e-5)
    short = collate([Row([3, 5, 8, 2, 7, 1], 2)], target, FeatureTap(target, [1, 2]), some, 4)
    assert short.ids.tolist() == [[8, 2, 7, 1]]
    assert short.mask.int().tolist() == [[1, 1, 1, 0]]


def test_answers_that_loop_are_cut():
    fresh = list(range(100))
    assert before_loop(fresh) == 100
    assert before_loop([*fresh, *[1, 2] * 60]) < 170


def test_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    assert read_prompts(str(path)) == ["a", "b"]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(BadInputError, match="line 2"):
        read_prompts(str(path))
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(BadInputError, match="two are needed"):
        read_prompts(str(path))


def test_what_no_draft_can_be_trained_for():
    with pytest.raises(UnsupportedModelError, match="encoder"):
        check_target(build("llama", is_encoder_decoder=True))
    target = tiny_llama(20)
    target.model.layers = target.model.layers[:1]
    with pytest.raises(UnsupportedModelError, match="2 blocks"):
        check_target(target)
    narrow = build("opt", word_embed_proj_dim=16)
    with pytest.raises(UnsupportedModelError, match="DySpec\\('text'\\)"):
        check_target(narrow)


def test_settings_out_of_range():
    for bad in (dict(steps=0), dict(answers=1), dict(held_out=1.0), dict(length=2)):
        with pytest.raises(BadInputError):
            DraftTraining(**bad)


def test_the_card_names_this_training():
    assert find_card("dyspec").load_training().config is DraftTraining
