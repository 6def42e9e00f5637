"""Linear layers of 4 bits: the product of the weights that they stand for, and what they refuse."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from everytoken.core.converted import exact_in_4_bits
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.core.grouped.linear import group_linears
from everytoken.core.loading import load_model
from everytoken.testing.models import tiny_tokenizer

from ..gguf_files import write_gguf
from .conftest import small_llama


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_product_with_the_dequantised_weights(threads, rows, bias):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(96, 21, bias=bias)).eval()
    group_linears(layer)
    x = torch.randn(2, rows, 96)
    with torch.no_grad():
        expected = nn.functional.linear(x, layer[0].weight, layer[0].bias)
        assert torch.allclose(layer(x), expected, atol=1e-3)
        assert torch.equal(layer(x), torch.stack([layer(part) for part in x]))


def test_a_row_does_not_depend_on_the_others():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 40)).eval()
    group_linears(layer)
    x = torch.randn(11, 64)
    with torch.no_grad():
        assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_zeros_stay_zeros():
    layer = nn.Sequential(nn.Linear(64, 16, bias=False)).eval()
    group_linears(layer)
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 16))


def test_a_model_says_how_far_it_is_from_float32_and_is_kept(tmp_path):
    model, ids = small_llama(), torch.tensor([[1, 2, 3, 4, 5]])
    untouched = small_llama()
    report = group_linears(model, ids, tmp_path / "kept.safetensors")
    with torch.no_grad():
        before, after = untouched(ids).logits[0].log_softmax(-1), model(ids).logits[0].log_softmax(-1)
    assert report.divergence == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert report.exact < 0.5 and report.divergence > 0 and "nats" in str(report)
    again = small_llama()
    assert group_linears(again, ids, tmp_path / "kept.safetensors") == report
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_kept_weights_that_are_damaged_or_of_another_shape_are_made_anew(tmp_path):
    kept = tmp_path / "kept.safetensors"
    group_linears(nn.Sequential(nn.Linear(32, 8)).eval(), kept=kept)
    wide = nn.Sequential(nn.Linear(64, 8)).eval()
    group_linears(wide, kept=kept)
    kept.write_bytes(kept.read_bytes()[:50])
    group_linears(nn.Sequential(nn.Linear(32, 8)).eval(), kept=kept)
    with torch.no_grad():
        assert wide(torch.ones(1, 64)).shape == (1, 8)


def test_training_gradients_and_changed_weights_are_refused():
    layer = nn.Sequential(nn.Linear(32, 8)).eval()
    group_linears(layer)
    with pytest.raises(UnsupportedModelError, match="do not train"):
        layer(torch.ones(1, 32))
    with torch.no_grad():
        layer(torch.ones(1, 32))
        other = copy.deepcopy(layer)
        assert torch.equal(other(torch.ones(1, 32)), layer(torch.ones(1, 32)))
        with pytest.raises(UnsupportedModelError, match="bfloat16"):
            layer(torch.ones(1, 32, dtype=torch.bfloat16))
        layer[0].weight.zero_()
        with pytest.raises(UnsupportedModelError, match="changed"):
            layer(torch.ones(1, 32))
        with pytest.raises(UnsupportedModelError, match="do not train"):
            layer.train()(torch.ones(1, 32))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(48, 8)), "groups of 32"),
        (nn.Sequential(nn.Linear(32, 8).to(torch.bfloat16)), "bfloat16"),
        (nn.Sequential(nn.Linear(32, 8, device="meta")), "meta"),
        (nn.Sequential(), "none"),
    ],
)
def test_models_that_cannot_be_grouped_are_refused(model, words):
    with pytest.raises(UnsupportedModelError, match=words):
        group_linears(model)


def test_two_threads_may_use_the_layers_at_once(threads):
    layer = nn.Sequential(nn.Linear(64, 64)).eval()
    group_linears(layer)
    x = torch.randn(5, 64)
    with torch.no_grad():
        expected = layer(x)
    results = []

    def work():
        with torch.no_grad():
            results.extend(layer(x) for _ in range(20))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 60 and all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": "int3"}, "int4"),
        ({"weights": "int4", "dtype": "bfloat16"}, "float32"),
        ({"weights": "int4", "packed": True}, "contradict"),
        ({"weights": "int4", "device": "cuda"}, "CPU"),
        ({"weights": "bfloat16", "dtype": torch.float32}, "bfloat16"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_loaded(arguments, words):
    with pytest.raises(BadInputError, match=words):
        load_model("owner/nothing", **arguments)


def test_a_folder_is_loaded_with_4_bits(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    small_llama(vocab=264).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    model = load_model(tmp_path / "model", weights="int4")
    assert model.weights_report.divergence > 0 and hasattr(model.lm_head, "_grouped")
    assert len(list((tmp_path / "cache" / "grouped").glob("model-*.safetensors"))) == 1


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", None])
def test_a_gguf_file_of_4_bits_is_run_as_it_is_stored(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVERYTOKEN_MODELS", raising=False)
    path, _ = write_gguf(tmp_path / "tiny.gguf", kind=kind)
    model, plain = load_model(path, weights="int4"), load_model(path)
    exact = kind in ("Q4_0", "Q4_1")
    assert exact_in_4_bits(path) == exact == (model.weights_report.exact == 1)
    same = [torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)]
    assert all(same) == exact


@pytest.mark.slow
def test_the_trial_runs_4_bits_where_they_change_nothing_and_compares_with_the_faster_plain_arm(tmp_path, monkeypatch):
    from everytoken.decoding.plain import PlainDecoding
    from everytoken.decoding.trial import Trial, TrialRequest, run_decoders

    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVERYTOKEN_MODELS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path, _ = write_gguf(tmp_path / "tiny.gguf", kind="Q4_1")
    trials = [Trial("plain", PlainDecoding)]
    request = TrialRequest(trials, str(path), "abc", options={"max_new_tokens": 6})
    result = run_decoders(request, "")
    assert {"plain generate", "plain, compiled", "plain"} == set(result.rows)
    plain = ("plain generate", "plain, compiled")
    assert result.baseline == max(plain, key=lambda name: result.rows[name]["tokens per second"])
    assert any("all weights as stored" in note for note in result.notes)
