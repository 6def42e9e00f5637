"""The station's trial on a model of the shipped one's form without its weights, and on an image of the user's."""

from __future__ import annotations

import pytest
import torch

from everytoken.catalog import find_card
from everytoken.core.errors import BadInputError, MissingExtraError
from everytoken.core.trace_html import render_html
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.reduction import trial as module
from everytoken.reduction.baselines import RandomTokens
from everytoken.reduction.catp import CATP
from everytoken.reduction.divprune import DivPrune
from everytoken.reduction.fastv import FastV
from everytoken.reduction.trial import fitted, trial
from everytoken.training.datasets.scenes import scene_tokenizer
from everytoken.training.vision import new_vlm, vlm_config


@pytest.fixture
def untrained(monkeypatch):
    """The shipped model's form with random weights, eight questions, and a processor that only decodes."""
    model = new_vlm(vlm_config(hidden=16)).eval()
    tokenizer = scene_tokenizer()

    class Processor:
        image_token = "<image>"

        def decode(self, ids, **_):
            return tokenizer.decode(ids)

        def __call__(self, images, text, return_tensors):
            ids = tokenizer(text.replace("<image>", "<image> " * 64), return_tensors="pt")
            return dict(ids) | {"pixel_values": torch.randn(1, 3, 64, 64)}

    monkeypatch.setattr(module, "load_vlm", lambda _model: model)
    monkeypatch.setattr(module, "load_processor", lambda _model: Processor())
    monkeypatch.setattr(module, "resolve_vlm", lambda name=None: name or "shipped")
    monkeypatch.setattr(module, "QUESTIONS", 8)
    monkeypatch.setattr(module, "BATCH", 4)
    return model


def test_every_arm_answers_the_same_questions(untrained):
    result = trial(TrialRequest([Trial("divprune", DivPrune, {"keep": 0.25})]))
    assert list(result.rows) == ["all tokens", "divprune", "divprune, original positions", "random"]
    assert [row["visual tokens"] for row in result.rows.values()] == [64, 16, 16, 16]
    assert all(0 <= row["accuracy"] <= 1 for row in result.rows.values())
    assert result.headline == "accuracy"
    flops = [row["decoder MFLOPs, first prompt"] for row in result.rows.values()]
    assert flops[0] > 2 * flops[1] == 2 * flops[3]
    (trace,) = result.traces
    assert len(trace) == 64 and trace.columns["kept"].count("kept") == 16
    assert trace.labels[9] == "1,1 "
    page = render_html(result.traces, None, result.column, before="".join(result.pictures))
    assert page.count("data:image/png") == 2 and "divprune: 16 of 64 tokens" in page


def test_cuts_inside_the_decoder_are_counted_where_they_end(untrained):
    result = trial(TrialRequest([Trial("catp", CATP), Trial("fastv", FastV, {"layer": 2, "remove": 0.75})]))
    assert result.rows["catp"]["visual tokens"] == 39
    assert result.rows["fastv"]["visual tokens"] == 16
    assert result.rows["random for fastv"]["visual tokens"] == 16
    assert "3 decoder layers: CATP ran with layer=1, query_stage=False" in result.notes[1]
    assert "no demonstrations" in result.notes[0]
    assert fitted(CATP, {"layer": 2}, untrained, result) == {"layer": 2}
    assert FastV.for_depth(3) == CATP.for_depth(8) == CATP.for_depth(4) == {"layer": 1}
    assert not FastV.for_depth(4) and not CATP.for_depth(9)


def test_an_image_of_the_users(untrained, tmp_path):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "photo.png"
    image.new("RGB", (70, 50)).save(path)
    request = TrialRequest(
        [Trial("divprune", DivPrune)], "mine", "red", options={"image": str(path), "max_new_tokens": 2}
    )
    result = trial(request)
    assert result.headline == "visual tokens"
    assert result.rows["divprune"]["visual tokens"] == 6 and result.texts["divprune"]
    assert any(note.startswith("divprune: ") for note in result.notes)
    path.write_bytes(b"no image")
    with pytest.raises(BadInputError, match="no image that can be read"):
        trial(request)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TrialRequest([], "mine"), "Give an image"),
        (TrialRequest([], None, "red"), "questions of their own"),
        (TrialRequest([], None, None, "file.jsonl"), "not a data file"),
        (TrialRequest([], "mine", options={"image": "nowhere.png"}), "no file nowhere.png"),
    ],
)
def test_bad_input(untrained, request_, message):
    with pytest.raises(BadInputError, match=message):
        trial(request_)


def test_random_tokens_are_a_subset():
    features = torch.randn(10, 3)
    from everytoken.reduction.base import ReductionContext

    reduction = RandomTokens(0.4).reduce(features, ReductionContext(generator=torch.Generator().manual_seed(0)))
    assert len(reduction.kept) == 4 and torch.equal(reduction.features, features[reduction.kept])


def test_cards_lead_here():
    assert find_card("divprune").load_trial() is trial


def test_without_pillow_there_is_a_trace_and_no_picture(untrained, monkeypatch):
    def missing(*_):
        raise MissingExtraError("PIL", "vision", "Drawing images")

    monkeypatch.setattr(module, "reduction_html", missing)
    result = trial(TrialRequest([Trial("divprune", DivPrune)]))
    assert not result.pictures and result.traces and "needs PIL" in result.notes[-1]
