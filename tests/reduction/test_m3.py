"""M3: pooled sets are nested, the loss is the mean of the scales' losses, and gradients are what they should be."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import Trainer, TrainingArguments

from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.reduction.base import Reducer, ReductionContext
from everytoken.reduction.m3 import (
    GranularityReport,
    MatryoshkaMixin,
    MatryoshkaPool,
    block_side,
    legal_scales,
    matryoshka_backward,
    matryoshka_loss,
    pool_scale,
    projected,
    scale_loss,
    shortened,
)
from everytoken.reduction.m3_training import M3Training, nested_scales
from everytoken.reduction.seam import reduce_tokens
from everytoken.testing.models import tiny_llama, tiny_llava

IMAGE = 12
SCALES = (4, 1)


def features(side=24, width=5, seed=0):
    return torch.randn(2, side * side, width, generator=torch.Generator().manual_seed(seed))


def batch(rows=2, seed=0, pad=0):
    """Questions of a tiny LLaVA whose images are four tokens; the second half is answers."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(1, 11, (rows, 6), generator=generator)
    ids = torch.cat([torch.full((rows, 4), IMAGE), text], 1)
    labels = ids.clone()
    labels[:, :7] = -100
    mask = torch.ones_like(ids)
    if pad:
        ids[0, -pad:], mask[0, -pad:], labels[0, -pad:] = 0, 0, -100
    pixels = torch.randn(rows, 3, 8, 8, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask, "labels": labels}


# -- pooling ----------------------------------------------------------------------------------------------------------
def test_pool_of_pool_is_the_direct_pool_and_the_mean_never_changes():
    x = features()
    finer = x
    for s in (144, 36, 9, 1):
        finer = pool_scale(finer, s)
        direct = pool_scale(x, s)
        assert torch.allclose(finer, direct, atol=2e-6)
        assert torch.allclose(direct.mean(1), x.mean(1), atol=2e-6)
    assert pool_scale(x, 576) is x
    assert torch.allclose(pool_scale(x, 1)[:, 0], x.mean(1), atol=2e-6)


def test_a_coarse_token_is_the_mean_of_its_block():
    x, coarse = features(8), pool_scale(features(8), 16)
    image = x.reshape(2, 8, 8, 5)
    for row in range(4):
        for column in range(4):
            block = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2))
            assert torch.allclose(coarse[:, 4 * row + column], block, atol=1e-6)


def test_scales_that_are_none_are_refused_and_named():
    assert legal_scales(24) == [576, 144, 64, 36, 16, 9, 4, 1]
    assert legal_scales(8) == [64, 16, 4, 1] and legal_scales(4, 6) == [24, 6]
    for wrong in (100, 50, 2):  # which the released code changes silently
        with pytest.raises(BadInputError, match="576, 144, 64, 36, 16, 9, 4, 1"):
            block_side(wrong, (24, 24))
    with pytest.raises(BadInputError, match="no square grid"):
        pool_scale(torch.zeros(1, 65, 3), 16)
    with pytest.raises(BadInputError, match="no grid of 3 x 5"):
        pool_scale(torch.zeros(1, 16, 3), 4, (3, 5))
    assert pool_scale(torch.zeros(1, 24, 3), 6, (4, 6)).shape == (1, 6, 3)


def test_the_gradient_of_a_fine_token_is_its_share_of_the_coarse_ones():
    x = features(8).requires_grad_()
    coarse = pool_scale(x, 4)
    outer = torch.randn(coarse.shape, generator=torch.Generator().manual_seed(1))
    coarse.backward(outer)
    image = x.grad.reshape(2, 2, 4, 2, 4, 5)
    assert torch.allclose(image, outer.reshape(2, 2, 1, 2, 1, 5).expand_as(image) / 16)


def test_pooling_commutes_with_the_last_layer_but_not_with_its_activation():
    """Why the place of the pool, behind the projector, matters."""
    torch.manual_seed(0)
    first, last = torch.nn.Linear(5, 7), torch.nn.Linear(7, 5)
    x = features(8)
    hidden = torch.nn.functional.gelu(first(x))
    behind = pool_scale(last(hidden), 16)
    assert torch.allclose(behind, last(pool_scale(hidden, 16)), atol=1e-6)
    before = last(torch.nn.functional.gelu(first(pool_scale(x, 16))))
    assert (behind - before).abs().max() > 1e-2


def test_the_reducer_keeps_the_contract():
    x = features(8)[0]
    pool = MatryoshkaPool(16)
    reduction = pool.reduce(x, ReductionContext(grid=(8, 8)))
    assert isinstance(pool, Reducer)
    assert torch.allclose(reduction.assignment @ x, reduction.features, atol=1e-6)
    assert reduction.sizes.tolist() == [4] * 16 and torch.allclose(reduction.assignment.sum(1), torch.ones(16))
    assert reduction.anchors.tolist() == [16 * row + 2 * column for row in range(4) for column in range(4)]
    assert torch.equal(MatryoshkaPool(64).reduce(x, ReductionContext()).features, x)
    with pytest.raises(BadInputError, match="64, 16, 4, 1"):
        MatryoshkaPool(9).reduce(x, ReductionContext())
    with pytest.raises(BadInputError, match="one token at least"):
        MatryoshkaPool(0)


# -- the loss ---------------------------------------------------------------------------------------------------------
def test_the_full_scale_alone_is_the_models_own_loss():
    model, rows = tiny_llava(), batch()
    loss, losses = matryoshka_loss(model, rows, [4])
    assert torch.allclose(loss, model(**rows).loss, atol=1e-6) and torch.equal(losses[4], loss.detach())


def test_the_loss_at_a_scale_is_that_of_the_gathered_embeddings():
    model, rows = tiny_llava(), batch(pad=2)
    x = projected(model, rows)
    embedded = model.get_input_embeddings()(rows["input_ids"][:, 4:])
    whole = torch.cat([x.mean(1, keepdim=True), embedded], 1)
    labels = torch.cat([rows["labels"][:, :1], rows["labels"][:, 4:]], 1)
    mask = torch.cat([rows["attention_mask"][:, :1], rows["attention_mask"][:, 4:]], 1)
    expected = model(inputs_embeds=whole, labels=labels, attention_mask=mask).loss
    assert torch.allclose(scale_loss(model, rows, x, 1), expected, atol=1e-6)


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)])
def test_loss_and_gradient_are_means_over_scales_and_scale_by_scale_is_the_same(weights):
    shares = weights or (0.5, 0.5)
    model, rows = tiny_llava(), batch()
    model.config._attn_implementation = "eager"

    def gradients(backward):
        model.zero_grad()
        backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    joint = gradients(lambda: matryoshka_loss(model, rows, SCALES, weights)[0].backward())
    apart = gradients(lambda: matryoshka_backward(model, rows, SCALES, weights))
    single = [gradients(lambda s=s: matryoshka_loss(model, rows, [s])[0].backward()) for s in SCALES]
    assert len(joint) > 20 and any("vision_tower" in name for name in joint)
    for name, gradient in joint.items():
        mean = sum(share * found[name] for share, found in zip(shares, single, strict=True))
        assert torch.allclose(gradient, mean, atol=1e-5), name
        assert torch.allclose(gradient, apart[name], atol=1e-5), name
    loss, losses = matryoshka_loss(model, rows, SCALES, weights)
    assert loss.item() == pytest.approx(sum(share * losses[s].item() for share, s in zip(shares, SCALES, strict=True)))
    assert loss.item() == pytest.approx(matryoshka_backward(model, rows, SCALES, weights)[0].item())


def test_the_encoder_runs_once():
    model, count = tiny_llava(), [0]
    model.model.vision_tower.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    matryoshka_backward(model, batch(), SCALES)
    assert count == [1]


def test_the_dial_at_inference_is_the_scale_of_the_loss():
    """``reduce_tokens`` with MatryoshkaPool gives the loss that training saw."""
    model, rows = tiny_llava(), batch()
    with torch.no_grad(), reduce_tokens(model, MatryoshkaPool(1)):
        dialled = model(**rows).loss
    assert torch.allclose(dialled, scale_loss(model, rows, projected(model, rows), 1), atol=1e-6)


@pytest.mark.slow
def test_transformers_trainer_trains_it(tmp_path):
    class Trained(MatryoshkaMixin, Trainer):
        scales = SCALES

    model, rows = tiny_llava(), batch(4)
    data = [{name: value[i] for name, value in rows.items()} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, remove_unused_columns=False, prediction_loss_only=True,
    )  # fmt: skip
    trainer = Trained(model=model, args=arguments, train_dataset=data)
    expected = matryoshka_loss(model, rows, SCALES)[0].item()
    trainer.train()
    assert matryoshka_loss(model, rows, SCALES)[0].item() < expected - 0.01
    with pytest.raises(UnsupportedModelError, match="no common form"):
        trainer.compute_loss(model, rows, return_outputs=True)


def test_what_is_refused():
    model, rows = tiny_llava(), batch()
    for scales, words in (((), "one at least"), ((4, 4), "different numbers"), ((3,), "makes: 4, 1")):
        with pytest.raises(BadInputError, match=words):
            matryoshka_loss(model, rows, scales)
    with pytest.raises(BadInputError, match="one weight a scale"):
        matryoshka_loss(model, rows, SCALES, (0.5, 0.6))
    with pytest.raises(BadInputError, match="no labels"):
        matryoshka_loss(model, {name: value for name, value in rows.items() if name != "labels"}, SCALES)
    text = {name: value for name, value in rows.items() if name != "pixel_values"}
    with pytest.raises(BadInputError, match="no images"):
        matryoshka_loss(model, text, SCALES)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        projected(tiny_llama(), rows)
    with pytest.raises(BadInputError, match="as many images"):
        shortened({"input_ids": torch.tensor([[IMAGE, IMAGE, 1]])}, IMAGE, 4, 1)


def test_two_images_a_row_lose_tokens_of_each():
    ids = torch.tensor([[IMAGE] * 4 + [1] + [IMAGE] * 4 + [2, 3]])
    assert shortened({"input_ids": ids}, IMAGE, 4, 1)["input_ids"].tolist() == [[IMAGE, 1, IMAGE, 2, 3]]


# -- what a data set needs --------------------------------------------------------------------------------------------
def test_the_oracle_takes_the_smallest_scale_that_is_right():
    report = GranularityReport({1: [True, False, False, False], 16: [False, True, True, False]}, ("a", "a", "b", "b"))
    assert report.accuracy() == {1: 0.25, 16: 0.5} and report.accuracy("b") == {1: 0.0, 16: 0.5}
    assert report.oracle() == (0.75, (1 + 16 + 16 + 16) / 4)
    with pytest.raises(BadInputError, match="no question of the kind"):
        report.accuracy("c")
    for right, kinds in (({}, ()), ({1: [True], 4: []}, ()), ({1: [True]}, ("a", "b"))):
        with pytest.raises(BadInputError, match="same questions"):
            GranularityReport(right, kinds)


def test_the_oracle_is_no_worse_than_any_scale_and_grows_with_more_scales():
    rng = random.Random(0)
    for _ in range(20):
        right = {s: [rng.random() < 0.5 for _ in range(9)] for s in (1, 4, 16)}
        share, tokens = GranularityReport(right).oracle()
        assert share >= max(GranularityReport(right).accuracy().values()) and tokens <= 16
        assert GranularityReport({s: right[s] for s in (1, 4)}).oracle()[0] <= share


# -- settings ---------------------------------------------------------------------------------------------------------
def test_scales_of_the_training():
    assert nested_scales(24) == [576, 144, 36, 9, 1] and nested_scales(8) == [64, 16, 4, 1]
    assert M3Training(scales="64, 4").chosen(8) == [64, 4]
    for settings, words in (
        ({"scales": "many"}, "divided by commas"),
        ({"steps": 0}, "one step"),
        ({"batch": 5}, "equal"),
    ):
        with pytest.raises(BadInputError, match=words):
            M3Training(**settings)
