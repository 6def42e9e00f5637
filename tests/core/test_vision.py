"""The shipped vision-language model: it loads offline, sees what it says it sees, and others are loaded or refused."""

from __future__ import annotations

import json

import pytest
import torch

from everytoken.core.errors import BadInputError, MissingExtraError, UnsupportedModelError
from everytoken.core.vision import EMBEDDED_VLM, load_processor, load_vlm, resolve_vlm
from everytoken.testing.models import tiny_llama, tiny_llava
from everytoken.training.datasets.scenes import KINDS
from everytoken.training.vision import held_out, right_answers


@pytest.fixture(scope="module")
def shipped():
    return load_vlm(), load_processor()


def test_it_is_made_of_the_real_classes(shipped):
    model, processor = shipped
    assert type(model).__name__ == "LlavaForConditionalGeneration" and not model.training
    assert type(model.model.vision_tower).__name__ == "CLIPVisionModel"
    assert type(model.model.language_model).__name__ == "LlamaModel"
    assert type(processor).__name__ == "LlavaProcessor"
    assert sum(weight.numel() for weight in model.parameters()) < 800_000
    assert model.dtype == torch.float32


def test_it_answers_what_it_was_trained_for(shipped):
    scenes, questions = held_out(200, seed=7)
    right = right_answers(shipped[0], scenes, questions)
    assert sum(right) / len(right) > 0.8
    for kind in KINDS:
        some = [value for value, asked in zip(right, questions, strict=True) if asked.kind == kind]
        # a quarter of the image is told from the three others half of the time: it sees above and below alone
        assert sum(some) / len(some) > (0.4 if kind == "where?" else 0.85), kind


def test_processor_and_generate_are_those_of_any_llava(shipped):
    """Images through PIL, a batch of texts of unequal length, and the end token after the answer."""
    model, processor = shipped
    scenes, questions = held_out(8, seed=8)
    inputs = processor(
        images=[scene.image() for scene in scenes], text=[asked.text for asked in questions], return_tensors="pt"
    )
    assert inputs["input_ids"].shape == (8, 66) and inputs["pixel_values"].shape == (8, 3, 64, 64)
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, 66:]
    said = processor.batch_decode(output, skip_special_tokens=True)
    right = right_answers(model, scenes, questions)
    assert [float(a == asked.answer) for a, asked in zip(said, questions, strict=True)] == right
    assert output.shape[1] == 2 and (output[:, 1] == model.config.eos_token_id).all()


def test_the_processor_makes_what_training_saw(shipped):
    from everytoken.training.datasets.scenes import pixel_values

    scenes, _ = held_out(2, seed=9)
    made = shipped[1].image_processor([scene.image() for scene in scenes], return_tensors="pt")["pixel_values"]
    assert torch.allclose(made, pixel_values(scenes), atol=1e-5)


def test_an_image_of_another_size_is_fitted(shipped):
    scenes, questions = held_out(1, seed=8)
    large = scenes[0].image().resize((256, 256), resample=0)
    inputs = shipped[1](images=large, text=questions[0].text, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64) and inputs["input_ids"].shape == (1, 66)


def test_a_folder_of_ones_own(tmp_path):
    model = tiny_llava(13)
    model.save_pretrained(tmp_path)
    loaded = load_vlm(tmp_path, dtype="bfloat16", device="cpu")
    assert loaded.dtype == torch.bfloat16 and loaded.config.vision_config.image_size == 8
    assert resolve_vlm(EMBEDDED_VLM) == resolve_vlm(None)


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInputError, match="Unknown dtype"):
        load_vlm(dtype="float8")
    with pytest.raises(BadInputError, match="would read a pickle"):
        load_vlm(use_safetensors=False)
    with pytest.raises(BadInputError, match="holds no image encoder"):
        load_vlm("model.gguf")
    with pytest.raises(BadInputError, match="no folder or file"):
        load_processor(tmp_path / "nothing")
    tiny_llama(16).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no vision-language model"):
        load_vlm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(BadInputError, match="may run any code"):
        load_vlm(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="PIL"):
        load_processor()
