"""``train`` and ``try`` of this station: from a card alone, a folder that transformers reads, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from everytoken.architectures.trial import trial
from everytoken.catalog import find_card
from everytoken.core.errors import BadInputError
from everytoken.decoding.trial import Trial, TrialRequest
from everytoken.training.base import TrainingContext, read_config

SMALL = {
    "mrt5": ["steps=2", "batch=2", "length=32", "width=32", "ff_width=32", "layers=2", "gate_layer=1", "delete_from=0"],
    "hat": ["steps=2", "batch=2", "length=48", "byte_width=32", "width=32", "layers=1"],
    "lexinvariant": ["steps=2", "batch=2", "length=48", "width=32", "layers=1"],
}


def trained(slug, folder, *settings):
    training = find_card(slug).load_training()
    config = read_config(training, None, [*SMALL[slug], *settings])
    return training.run(config, TrainingContext(None, None, folder))


@pytest.mark.slow
@pytest.mark.parametrize("slug", SMALL)
def test_a_training_writes_what_try_reads(slug, tmp_path):
    result = trained(slug, tmp_path)
    assert [path.name for path in result.files] == ["model", "training.json", "report.html"]
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["method"] == slug
    assert record["curves"]["loss"]
    assert "<h2>" in (tmp_path / "report.html").read_text()
    method = find_card(slug).load()
    request = TrialRequest(
        [Trial(slug, method)],
        str(tmp_path / "model"),
        "The old bridge stood in the rain.",
        options={"max_new_tokens": 2},
    )
    found = trial(request)
    assert slug in found.rows
    assert found.headline in found.rows[slug]
    assert found.traces[0].columns[method.trace_columns[0]]
    with pytest.raises(BadInputError, match=f"holds a {slug} model"):
        next(find_card(other).load() for other in SMALL if other != slug).folder(str(tmp_path / "model"))
    with pytest.raises(BadInputError, match="empty"):
        trial(TrialRequest([Trial(slug, method)], str(tmp_path / "model"), " "))
    again = trained(slug, tmp_path)  # a finished training is only read
    assert again.figures == pytest.approx(result.figures)


@pytest.mark.slow
def test_mrt5_goes_on_from_its_own_folder_and_learns_another_task(tmp_path):
    trained("mrt5", tmp_path / "one")
    training = find_card("mrt5").load_training()
    config = read_config(training, None, [*SMALL["mrt5"], "task=vowels"])
    result = training.run(config, TrainingContext(str(tmp_path / "one" / "model"), None, tmp_path / "two"))
    assert 0 <= result.figures["deleted share"] <= 1
    with pytest.raises(BadInputError, match="goes on from a ByT5"):
        trained("hat", tmp_path / "hat")
        training.run(config, TrainingContext(str(tmp_path / "hat" / "model"), None, tmp_path / "three"))


@pytest.mark.parametrize("slug", SMALL)
def test_settings_out_of_range_are_refused_before_anything(slug, tmp_path):
    training = find_card(slug).load_training()
    for settings in (["steps=0"], ["width=7"] if slug != "mrt5" else ["gate_layer=9"], ["lr=-1"]):
        with pytest.raises(BadInputError):
            read_config(training, None, settings)
    text = Path(tmp_path / "short.txt")
    text.write_text("too short")
    with pytest.raises(BadInputError, match="longer text"):
        training.run(read_config(training, None, []), TrainingContext(None, str(text), tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadInputError, match=r"no config\.json"):
        find_card("hat").load().folder(str(tmp_path))


@pytest.mark.slow
def test_auto_classes_read_a_trained_folder(tmp_path):
    trained("lexinvariant", tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 27
