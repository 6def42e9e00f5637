"""The label pipeline and the router's training, on small real models."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everytoken.core.errors import BadInputError
from everytoken.generation.routing.configuration_token_router import TokenRouterConfig
from everytoken.generation.routing.labels import DIVERGENT, IDENTICAL, NEUTRAL, Diary, Labels, label
from everytoken.generation.routing.training import (
    R2RTraining,
    choose_threshold,
    read_prompts,
    run,
    split_by_prompt,
    threshold_for_share,
    train_router,
    values,
)
from everytoken.generation.routing.verifiers import AnswerVerifier, JudgeVerifier, SimilarityVerifier
from everytoken.reproduce.beds.small_models import character_tokenizer
from everytoken.training.base import TrainingContext

from ...conftest import tiny_llama

PROMPTS = ["abc", "cab", "bbbb", "a", "ccab"]


@pytest.fixture(scope="module")
def pair():
    tokenizer = character_tokenizer("abcdefgh.#")
    large, small = tiny_llama(len(tokenizer), seed=1, scale=0.5), tiny_llama(len(tokenizer), seed=2, scale=0.5)
    return large, small, tokenizer


def greedy(large, tokenizer, text, new):
    ids = torch.tensor([text])
    return large.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)[0].tolist()


@pytest.mark.slow
def test_labels_are_identical_exactly_where_the_arg_max_is_and_divergent_where_the_outcome_is(pair):
    large, small, tokenizer = pair

    def outcome(text):
        return text[-3:]

    labels = label(small, large, tokenizer, PROMPTS, AnswerVerifier(outcome), max_new_tokens=8, batch=3, count=5)
    assert len(labels.kinds) == 5 * 8
    place = 0
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt)["input_ids"]
        whole = greedy(large, tokenizer, ids, 8)
        logits = small(torch.tensor([whole])).logits[0].detach()
        for step in range(8):
            at = len(ids) + step
            mine, theirs = int(logits[at - 1].argmax()), whole[at]
            assert labels.prompts[place] == index
            assert (labels.small[place], labels.large[place]) == (mine, theirs)
            kind = int(labels.kinds[place])
            assert (kind == IDENTICAL) == (mine == theirs)
            if mine != theirs:
                context = tokenizer.decode(whole[:at])
                sides = []
                for token in (mine, theirs):
                    full = greedy(large, tokenizer, [*whole[:at], token], 8)
                    sides.append(outcome(context + tokenizer.decode(full[at:])))
                assert (kind == DIVERGENT) == (sides[0] != sides[1])
            assert labels.logits[place].tolist() == pytest.approx(logits[at - 1].topk(5).values.tolist(), abs=1e-4)
            place += 1
    embedding = small.get_input_embeddings()(labels.small)
    assert torch.allclose(labels.embedding, embedding)


def test_continuations_stop_at_the_sentence(pair):
    large, small, tokenizer = pair
    seen = []

    class Spy:
        to_the_end = False

        def __call__(self, contexts, small, large):
            seen.extend(zip(contexts, small, large, strict=True))
            return [False] * len(contexts)

    labels = label(small, large, tokenizer, PROMPTS, Spy(), max_new_tokens=8, max_sentence=12)
    assert not (labels.kinds == DIVERGENT).any()
    assert (labels.kinds == NEUTRAL).sum() == len(seen) > 0
    for _, *sides in seen:
        for side in sides:
            assert len(side) <= 13
            assert "." not in side[1:-1]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_stopped(pair, tmp_path):
    large, small, tokenizer = pair
    whole = label(small, large, tokenizer, PROMPTS, AnswerVerifier(last_letters), max_new_tokens=8, batch=2, count=5)
    asked: list[int] = []

    class Breaks(AnswerVerifier):
        def __call__(self, contexts, small, large):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(len(contexts))
            return super().__call__(contexts, small, large)

    path = tmp_path / "labels.jsonl"
    arguments = dict(max_new_tokens=8, batch=2, count=5)
    with pytest.raises(KeyboardInterrupt):
        label(small, large, tokenizer, PROMPTS, Breaks(last_letters), **arguments, diary=Diary(path, "key"))
    with path.open("a") as file:
        file.write('{"verdict": [0')  # cut off in the middle of a line
    diary = Diary(path, "key")
    assert len(diary.answers) == 5
    assert len(diary.verdicts) == 4
    stages = []
    again = label(
        small, large, tokenizer, PROMPTS, AnswerVerifier(last_letters), **arguments, diary=diary,
        report=lambda stage, done, total: stages.append((stage, done)),
    )  # fmt: skip
    assert "the large model answers" not in dict(stages)
    assert next(done for stage, done in stages if stage == "both ways go on") == 4
    for name, value in vars(whole).items():
        assert torch.equal(value, getattr(again, name))
    assert Diary(path, "key").verdicts == diary.verdicts  # the cut line took nothing with it
    assert Diary(path, "other").answers == []


def synthetic(count=600, seed=0):
    """Labels that depend on the inputs: divergent where the first two features agree in sign."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 8, generator=generator)
    kinds = torch.where(hidden[:, 0] * hidden[:, 1] > 0.4, DIVERGENT, IDENTICAL)
    rest = torch.randn(count, 4, generator=generator)
    zeros = torch.zeros(count, dtype=torch.long)
    return Labels(hidden, rest, rest.sort(descending=True).values, kinds, torch.arange(count) // 20, zeros, zeros)


def test_a_router_learns_what_can_be_learnt():
    learn, held = split_by_prompt(synthetic(1200), 0.25, 0)
    assert not set(learn.prompts.tolist()) & set(held.prompts.tolist())
    config = TokenRouterConfig(8, 4, 4, width=32, num_blocks=2)
    router, curves = train_router(learn, config, held, epochs=80, lr=3e-3, batch=128, min_recall=0.9)
    assert curves["held-out loss"][-1] < curves["held-out loss"][0]
    scores, truth = torch.sigmoid(values(router, held)), held.kinds == DIVERGENT
    routed = scores >= router.config.threshold
    assert routed[truth].float().mean() >= 0.9
    assert routed[~truth].float().mean() < 0.25


def test_training_stops_early_and_keeps_the_best():
    learn, held = split_by_prompt(synthetic(200), 0.5, 0)
    config = TokenRouterConfig(8, 4, 4, width=64, num_blocks=2, dropout=0.0)
    router, curves = train_router(learn, config, held, epochs=300, patience=5, lr=1e-2, batch=32)
    losses = curves["held-out loss"]
    assert len(losses) < 300
    weight = (learn.kinds != DIVERGENT).sum() / (learn.kinds == DIVERGENT).sum()
    again = torch.nn.functional.binary_cross_entropy_with_logits(
        values(router, held), (held.kinds == DIVERGENT).float(), pos_weight=weight
    )
    assert again.item() == pytest.approx(min(losses), rel=1e-4)


@given(seed=st.integers(0, 1000), recall=st.floats(0.05, 1.0))
def test_the_threshold_is_the_largest_with_that_recall(seed, recall):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(50, generator=generator)
    divergent = torch.rand(50, generator=generator) < 0.3
    if not divergent.any():
        assert choose_threshold(scores, divergent, recall) == 0.5
        return
    threshold = choose_threshold(scores, divergent, recall)
    assert (scores[divergent] >= threshold).float().mean() >= recall - 1e-6
    above = scores[divergent][scores[divergent] > threshold]
    assert len(above) < recall * int(divergent.sum())


def test_the_threshold_for_a_share():
    scores = torch.arange(100).float()
    assert (scores >= threshold_for_share(scores, 0.1)).sum() == 11
    assert (scores >= threshold_for_share(scores, 1.0)).sum() == 100


def test_nothing_to_tell_apart_is_said():
    labels = synthetic()
    labels.kinds[:] = IDENTICAL
    with pytest.raises(BadInputError, match="nothing to tell apart"):
        train_router(labels, TokenRouterConfig(8, 4, 4, 8, 1), labels)


def test_verifiers(embedded):
    model, tokenizer = embedded
    pairs = (["The cat sat"] * 2, [" on the mat.", " at home."], [" on the mat.", " the exam in nuclear physics."])
    similar = SimilarityVerifier(0.9)(*pairs)
    assert similar == [False, True]
    answers = JudgeVerifier(model, tokenizer)(*pairs)
    assert len(answers) == 2
    assert all(isinstance(answer, bool) for answer in answers)


# -- the whole pipeline ------------------------------------------------------------------------------------------------
def last_letters(text):
    return text.strip()[-2:]


def test_the_pipeline_writes_a_router_and_goes_on_from_its_labels(pair, tmp_path):
    from everytoken.generation.r2r import R2R

    large, small, tokenizer = pair
    for name, model in (("large", large), ("small", small)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rng = random.Random(0)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join("".join(rng.choices("abcdefgh", k=4)) for _ in range(10)) + "\n")
    config = R2RTraining(
        small=str(tmp_path / "small"),
        verifier="tests.generation.routing.test_training:last_letters",
        max_new_tokens=8,
        width=16,
        num_blocks=1,
        epochs=3,
        lr=1e-3,
    )
    stages = []
    context = TrainingContext(
        str(tmp_path / "large"), str(prompts), tmp_path / "router", lambda stage, done, total: stages.append(stage)
    )
    result = run(config, context)
    assert {"the large model answers", "the small model reads", "both ways go on"} <= set(stages)
    assert all(path.is_file() for path in result.files)
    shares = [result.figures[name] for name in ("identical", "neutral", "divergent")]
    assert sum(shares) == pytest.approx(1.0)
    assert json.loads((tmp_path / "router" / "training.json").read_text())["curves"]["loss"]
    stages.clear()
    again = run(config, context)
    assert not {"the large model answers"} & set(stages)
    assert any("taken from" in note for note in again.notes)
    assert again.figures == result.figures
    output = large.generate(
        torch.tensor([[3, 4]]), max_new_tokens=6, do_sample=False,
        custom_generate=R2R(small, str(tmp_path / "router")),
    )  # fmt: skip
    assert output.shape == (1, 8)
    (tmp_path / "router" / "labels.safetensors").write_bytes(b"broken")
    with pytest.raises(BadInputError, match="Delete it"):
        run(config, context)


@pytest.mark.parametrize(
    ("text", "suffix", "words"),
    [
        ("one\n", ".txt", "two are needed"),
        ('{"prompt": "a"}\n{"text": "b"}\n', ".jsonl", "line 2"),
        ('{"prompt": "a"}\nnot json\n', ".jsonl", "line 2"),
    ],
)
def test_bad_prompts_are_named(tmp_path, text, suffix, words):
    path = tmp_path / f"prompts{suffix}"
    path.write_text(text)
    with pytest.raises(BadInputError, match=words):
        read_prompts(str(path))
    with pytest.raises(BadInputError, match="no file"):
        read_prompts(str(tmp_path / "nowhere.txt"))
    assert len(read_prompts(None)) > 3


def test_bad_settings():
    with pytest.raises(BadInputError, match="shares between"):
        R2RTraining(held_out=1.5)
    with pytest.raises(BadInputError, match="Unknown verifier"):
        R2RTraining(verifier="magic")
