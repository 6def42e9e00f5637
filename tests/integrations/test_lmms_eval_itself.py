"""The adapter inside lmms-eval's own registry and with its own requests; `make test-lmms` installs lmms-eval for it."""

from __future__ import annotations

import pytest
import torch

models = pytest.importorskip("lmms_eval.models")
pytest.importorskip("PIL")

from lmms_eval.api.instance import Instance, unwrap_generation_output

from everytoken.core.errors import BadInputError, UnknownNameError, UnsupportedModelError
from everytoken.core.vision import load_vlm
from everytoken.integrations.lmms_eval import manifest
from everytoken.reduction.divprune import DivPrune
from everytoken.reduction.seam import reduce_tokens
from everytoken.training.vision import held_out, right_answers

pytestmark = pytest.mark.slow
SETTINGS = {"max_new_tokens": 2, "until": ["\n"], "temperature": 0}


def made(arguments, batch_size=1):
    """As its command line makes a model."""
    models.MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    return models.get_model("everytoken_reduced").create_from_arg_string(
        arguments, {"batch_size": batch_size, "max_batch_size": None, "device": "cpu"}
    )


def requests(model, count=12, kind="generate_until"):
    """Questions about scenes as a task of lmms-eval asks them."""
    scenes, asked = held_out(count)
    documents = [
        {"image": scene.image(), "question": f"{item.kind} {item.about}", "answer": item.answer}
        for scene, item in zip(scenes, asked, strict=True)
    ]
    model.task_dict["scenes"] = {"test": documents}
    found = []
    for number, document in enumerate(documents):
        second = dict(SETTINGS) if kind == "generate_until" else (lambda document: document["answer"])
        arguments = (document["question"], second, lambda document: [document["image"]], number, "scenes", "test")
        found.append(Instance(kind, arguments, 0, {"task": "scenes", "doc_id": number, "repeats": 1}))
    return found, scenes, asked


@pytest.mark.parametrize("batch_size", [1, 5])
def test_answers_are_those_of_the_reduced_model(batch_size):
    model = made("pretrained=scenes-vlm,reducer=divprune,keep=0.25", batch_size)
    given, scenes, asked = requests(model)
    answers = [unwrap_generation_output(item) for item in model.generate_until(given)]
    right = [float(text == item.answer) for (text, _), item in zip(answers, asked, strict=True)]
    plain = load_vlm(dtype="float32", device="cpu")
    with reduce_tokens(plain, DivPrune(keep=0.25)):
        assert right == right_answers(plain, scenes, asked)
    assert sum(right) >= 6
    assert {counts.input_tokens for _, counts in answers} == {16 + 2}
    assert (model.tokens_before, model.tokens_after) == (64 * 12, 16 * 12)


def test_the_likelihood_of_an_answer_is_the_reduced_models():
    model = made("pretrained=scenes-vlm,reducer=divprune,keep=0.25")
    given, _, _ = requests(model, 4, "loglikelihood")
    found = model.loglikelihood(given)
    inputs = model._inputs([given[0].args[0]], [[model.task_dict["scenes"]["test"][0]["image"].convert("RGB")]])
    with reduce_tokens(model.model, DivPrune(keep=0.25)), torch.no_grad():
        logits = model.model(**inputs).logits[0, -1].float()
    word = model.processor.tokenizer(model.task_dict["scenes"]["test"][0]["answer"])["input_ids"][-1]
    assert found[0][0] == pytest.approx(float(logits.log_softmax(-1)[word]), abs=1e-4)
    assert found[0][1] == (int(logits.argmax()) == word)


def test_a_reducer_never_sees_the_answer():
    model = made("reducer=token-reduction")
    given, _, _ = requests(model, 2, "loglikelihood")
    model.loglikelihood(given)
    kept = model.tokens_after
    for document in model.task_dict["scenes"]["test"]:
        document["answer"] = "bar"
    model.tokens_after = 0
    model.loglikelihood(given)
    assert model.tokens_after == kept


def test_all_tokens_and_prompts_without_images():
    model = made("reducer=none")
    given, _, asked = requests(model, 6)
    answers = [unwrap_generation_output(item)[0] for item in model.generate_until(given)]
    assert sum(text == item.answer for text, item in zip(answers, asked, strict=True)) >= 3
    reduced = made("reducer=fastv,layer=1,remove=0.5")
    given, _, _ = requests(reduced, 2)
    bare = (given[0].args[0], dict(SETTINGS), lambda document: [], 0, "scenes", "test")
    texts = reduced.generate_until([Instance("generate_until", bare, 0, {"task": "scenes", "doc_id": 0, "repeats": 1})])
    assert isinstance(unwrap_generation_output(texts[0])[0], str) and reduced.tokens_before == 0


def test_what_is_refused():
    for arguments, error, words in (
        ("reducer=divprun", UnknownNameError, "divprune"),
        ("reducer=divprune,kept=0.1", UnknownNameError, "keep"),
        ("reducer=divprune,keep=1.5", BadInputError, "keep"),
        ("reducer=none,keep=0.1", UnknownNameError, "keep"),
        ("reducer=tokenpacker", UnknownNameError, "tokenpacker"),
        ("pretrained=nowhere/at/all", BadInputError, "nowhere"),
    ):
        with pytest.raises(error, match=words):
            made(arguments)
    fast = made("reducer=fastv,layer=1")
    given, _, _ = requests(fast, 1, "loglikelihood")
    with pytest.raises(UnsupportedModelError, match="last token"):
        fast.loglikelihood(given)
    with pytest.raises(UnsupportedModelError, match="single rounds"):
        fast.generate_until_multi_round([])
    video = (given[0].args[0], dict(SETTINGS), lambda document: ["clip.mp4"], 0, "scenes", "test")
    with pytest.raises(BadInputError, match="str"):
        fast.generate_until([Instance("generate_until", video, 0, {"task": "scenes", "doc_id": 0, "repeats": 1})])
