"""Token-Shuffle around several backbones: the plain model as a special case, leaks, layouts, stages, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Qwen2Config,
    Qwen3Config,
)

from everytoken.architectures.token_shuffle.configuration_token_shuffle import TokenShuffleConfig
from everytoken.architectures.token_shuffle.layout import FusedLayout
from everytoken.architectures.token_shuffle.modeling_token_shuffle import (
    TokenShuffleForConditionalGeneration,
    squared_partition,
)
from everytoken.core.errors import BadInputError, UnsupportedModelError

PAD, BOI, EOI, FIRST, CODES, TEXT = 0, 1, 2, 3, 8, 11
VOCABULARY = 20
SHARED = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
BACKBONES = {
    "llama": lambda: LlamaConfig(**SHARED, **SIZES, initializer_range=0.2),
    "qwen2": lambda: Qwen2Config(**SHARED, **SIZES, initializer_range=0.2),
    "qwen3": lambda: Qwen3Config(**SHARED, **SIZES, initializer_range=0.2, head_dim=8),
    "gpt2": lambda: GPT2Config(
        **SHARED, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip

CASES = ["llama", "gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3"))]


def network(backbone="llama", window=2, grid=(4, 4), seed=0, **settings):
    torch.manual_seed(seed)
    config = TokenShuffleConfig(
        backbone_config=BACKBONES[backbone](), window=window, grid=grid, num_image_tokens=CODES, **settings
    )
    return TokenShuffleForConditionalGeneration(config).eval()


def plain(backbone="llama", **settings):
    """A window of one token, no blocks, and maps that are the identity."""
    model = network(backbone, window=1, num_blocks=0, fuse_activation="none", **settings)
    with torch.no_grad():
        for module in (model.shuffle, model.unshuffle):
            torch.nn.init.eye_(module.linear.weight)
            module.linear.bias.zero_()
    return model


def rows(count=2, text=2, tokens=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(TEXT, VOCABULARY, (count, text), generator=generator)
    image = torch.randint(FIRST, FIRST + CODES, (count, tokens), generator=generator)
    marks = torch.ones(count, 1, dtype=torch.long)
    return torch.cat([words, marks * BOI, image, marks * EOI], 1)


@pytest.mark.parametrize("backbone", CASES)
def test_windows_of_one_token_are_the_plain_model_bit_for_bit(backbone):
    model, ids = plain(backbone), rows()
    found = model(ids, labels=ids)
    mine = torch.autograd.grad(found.loss, list(model.backbone.parameters()))
    wanted = model.backbone(ids, labels=ids)
    theirs = torch.autograd.grad(wanted.loss, list(model.backbone.parameters()))
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    embeddings = model.get_input_embeddings().weight
    for (name, weight), ours, other in zip(model.backbone.named_parameters(), mine, theirs, strict=True):
        if weight is embeddings or "norm.weight" in name:  # summed in another order
            assert torch.allclose(ours, other, rtol=1e-5, atol=1e-7), name
        else:
            assert torch.equal(ours, other), name


@torch.no_grad()
@pytest.mark.parametrize("backbone", CASES)
@pytest.mark.parametrize("window", [1, 2, 4, (1, 4), (4, 2)])
def test_a_window_does_not_see_itself_or_what_follows(backbone, window):
    """At every token: the logits of its window and of all before stay bit for bit, those of later windows change."""
    model, ids = network(backbone, window), rows(1)
    layout = FusedLayout.of(ids, None, model.is_image(ids), (4, 4), tuple(model.config.window), BOI)
    changed = ids.repeat(17, 1)  # row 0 as it is, each other one with another image token
    places = torch.arange(3, 19)
    changed[places - 2, places] = FIRST + (ids[0, places] - FIRST + 1) % CODES
    logits = model(changed).logits
    for token in range(3, 19):
        same = (logits[0] == logits[token - 2]).all(-1)
        own = layout.window[0, token]
        kept = layout.window[0, 1:] <= own  # by the token that is predicted; text before the image has -1
        kept[layout.position[0, 1:] > layout.position[0, token]] = False
        assert bool(same[:-1][kept].all())
        assert not bool(same[:-1][~kept].any())


def test_the_loss_is_the_mean_over_all_tokens_by_hand():
    """Each window from the state before it, each token from its own piece."""
    model, ids = network(), rows(1)
    embeds = model.get_input_embeddings()(ids)[0]
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    fused = [model.shuffle(embeds[[3 + token for token in window]]) for window in windows]
    row = torch.stack([embeds[0], embeds[1], embeds[2], *fused, embeds[19]])
    states = model.backbone.base_model(inputs_embeds=row[None]).last_hidden_state[0]
    head = model.get_output_embeddings()
    logps = [head(states[0]).log_softmax(-1)[ids[0, 1]], head(states[1]).log_softmax(-1)[ids[0, 2]]]
    for number, window in enumerate(windows):
        pieces = head(model.unshuffle(states[2 + number])).log_softmax(-1)
        logps += [pieces[place, ids[0, 3 + token]] for place, token in enumerate(window)]
    logps.append(head(states[6]).log_softmax(-1)[ids[0, 19]])
    wanted = -torch.stack(logps).mean()
    found = model(ids, labels=ids).loss
    assert torch.allclose(found, wanted, rtol=1e-6)
    learned = [weight for weight in model.parameters() if weight.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(found, learned), torch.autograd.grad(wanted, learned), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_the_cache_counts_fused_positions():
    ids = rows()
    for window, positions in ((1, 16), (2, 4), (4, 1), ((1, 4), 4)):
        cache = network(window=window)(ids, use_cache=True).past_key_values
        assert cache.get_seq_length() == 2 + 1 + positions + 1
    with pytest.raises(BadInputError, match="whole rows"):
        network(window=(1, 4))(ids, past_key_values=cache)
    empty = network().new_cache()
    assert network()(ids, past_key_values=empty).past_key_values is empty and empty.get_seq_length() == 8


@torch.no_grad()
@pytest.mark.parametrize("backbone", CASES)
def test_rows_of_all_kinds_share_a_batch(backbone):
    """Text alone, one image, two images of other grids, padded on either side: each row as it is alone."""
    model = network(backbone)
    wide, small = rows(1, 1, 16, 1), rows(1, 3, 4, 2)
    alone = [
        (torch.tensor([[TEXT, TEXT + 1, TEXT + 2]]), None),
        (wide, (2, 8)),
        (torch.cat([rows(1, 2, 16, 3), small], 1), torch.tensor([[4, 4], [2, 2]])),
    ]
    longest = max(ids.shape[1] for ids, _ in alone)
    for left in (True, False):
        padded, masks = [], []
        for ids, _ in alone:
            sides = (longest - ids.shape[1], 0) if left else (0, longest - ids.shape[1])
            padded.append(torch.nn.functional.pad(ids, sides, value=PAD))
            masks.append(torch.nn.functional.pad(torch.ones_like(ids), sides))
        grids = torch.tensor([[2, 8], [4, 4], [2, 2]])
        found = model(torch.cat(padded), torch.cat(masks), grid=grids).logits
        for number, (ids, grid) in enumerate(alone):
            wanted = model(ids, grid=grid).logits[0]
            ours = found[number][masks[number][0].bool()]
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_an_open_image_is_answered_by_its_first_token():
    model, ids = network(), rows(1)
    full = model(ids).logits[:, 2]
    torch.testing.assert_close(model(ids[:, :3]).logits[:, 2], full)
    padded = torch.nn.functional.pad(ids[:, :3], (0, 2))
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(model(padded, mask).logits[:, 2], full)


def test_the_square_of_the_partition():
    ids = rows()
    labels = ids.masked_fill(ids == BOI, -100)
    without, model = network()(ids, labels=labels), network(z_loss=0.1)
    found = model(ids, labels=labels)
    kept = labels[:, 1:] != -100
    squares = without.logits[:, :-1].logsumexp(-1)[kept] ** 2
    assert torch.allclose(found.loss, without.loss + 0.1 * squares.mean())
    assert torch.allclose(squared_partition(without.logits, labels), squares.mean())
    weight = model.get_output_embeddings().weight
    (ours,) = torch.autograd.grad(found.loss - model.loss_function(found.logits, labels, VOCABULARY), weight)
    other = network()
    output = other(ids, labels=labels).logits[:, :-1].logsumexp(-1)[kept]
    (theirs,) = torch.autograd.grad(0.1 * output.square().mean(), other.get_output_embeddings().weight)
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-6)


# -- what independence costs -------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(("window", "steps"), [(1, 80), (2, 80)])
def test_windows_of_one_coin_are_learned_to_the_exact_cost_and_not_below(window, steps):
    """A window whose four tokens are one coin: 4 ln 2 for independent tokens, ln 2 token by token. The loss is exact:
    both images that exist are read.
    """
    ids = torch.tensor([[BOI, *[FIRST + side] * 4] for side in (0, 1)])
    labels = ids.masked_fill(ids == BOI, -100)
    model = network(window=window, grid=(2, 2), num_blocks=1)
    optimizer, lowest = torch.optim.Adam(model.parameters(), lr=1e-2), math.inf
    least = 4 * math.log(2) if window == 2 else math.log(2)
    for _ in range(steps):
        a_window = 4 * model(ids, labels=labels).loss
        lowest = min(lowest, float(a_window.detach()))
        optimizer.zero_grad()
        a_window.backward()
        optimizer.step()
    assert least - 1e-4 < lowest < least + 0.03


# -- around trained models ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_plain_model_gets_image_tokens_and_keeps_its_text(tmp_path):
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(BACKBONES["llama"]()).eval()
    text = torch.randint(3, VOCABULARY, (2, 5))
    wanted = backbone(text).logits
    model = TokenShuffleForConditionalGeneration.from_backbone(backbone, 6, window=2, grid=(4, 4))
    assert model.backbone is backbone and not model.training and model.config.vocab_size == VOCABULARY + 8
    assert torch.equal(model(text).logits[..., :VOCABULARY], wanted)
    config = model.config
    assert (config.boi_token_id, config.eoi_token_id, config.image_token_start) == (20, 21, 22)
    drawn = model.generate(text, seeds=[0, 1])
    assert int(drawn.codes.max()) < 6
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(text, seeds=[0, 1]).codes, drawn.codes)


@torch.no_grad()
def test_a_stage_goes_on_with_the_weights_of_the_stage_before():
    first = network(window=1, grid=(4, 4))
    settings = {"num_image_tokens": CODES, "grid": (8, 8), "num_blocks": 1, "image_token_start": FIRST}
    torch.manual_seed(1)
    second = TokenShuffleForConditionalGeneration.from_backbone(first.backbone, window=2, **settings)
    assert second.backbone is first.backbone
    assert second(rows(tokens=64), use_cache=True).past_key_values.get_seq_length() == 2 + 1 + 16 + 1
    scale = second.shuffle.linear.weight.std() * 4  # 1 over the root of what comes in
    assert 0.7 < float(scale) < 1.3 and not second.shuffle.linear.bias.any()


def test_models_that_change_their_logits_behind_the_head_are_refused():
    config = Gemma2Config(**SHARED, **SIZES, head_dim=8, final_logit_softcapping=2.0)
    with pytest.raises(UnsupportedModelError, match="behind its head"):
        TokenShuffleForConditionalGeneration.from_backbone(Gemma2ForCausalLM(config), 4, grid=(4, 4))
    with pytest.raises(UnsupportedModelError, match="behind its head"):
        TokenShuffleForConditionalGeneration(TokenShuffleConfig(backbone_config=config, num_image_tokens=CODES))
    with pytest.raises(UnsupportedModelError, match="head"):
        TokenShuffleForConditionalGeneration.from_backbone(LlamaModel(BACKBONES["llama"]()), 4)


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_rows_that_make_no_images_are_refused():
    model, ids = network(), rows(1)
    for wrong, message in (
        (ids[:, :-3], "Image 0 has 14 tokens"),
        (ids[:, 3:], "behind <boi>"),
        (torch.cat([ids[:, :3], ids[:, 3:19], ids[:, 3:]], 1), "Image 0 has 32 tokens"),
        (ids.masked_fill(ids == BOI, TEXT), "behind <boi>"),
    ):
        with pytest.raises(BadInputError, match=message):
            model(wrong)
    for grid in ((3, 4), torch.tensor([[4, 4], [4, 4]]), (0, 4), (2, 6)):
        with pytest.raises(BadInputError):
            model(ids, grid=grid)
    with pytest.raises(BadInputError, match="ids"):
        model(inputs_embeds=torch.zeros(1, 3, 16))
    with pytest.raises(BadInputError, match="attention_mask"):
        model(ids, torch.ones(1, 3))
    with pytest.raises(BadInputError, match="64 of the backbone"):
        network("gpt2", window=1, grid=(8, 8))(rows(1, tokens=64))


@pytest.mark.parametrize(
    "change",
    [
        {"grid": (5, 4)},
        {"window": 3},
        {"window": (1, 2, 3)},
        {"window": 0},
        {"window": (3, 1), "grid": (3, 3)},
        {"num_image_tokens": 40},
        {"num_image_tokens": 0},
        {"boi_token_id": 2},
        {"boi_token_id": 5, "image_token_start": 3},
        {"boi_token_id": 99, "image_token_start": 3},
        {"fuse_activation": "relu"},
        {"num_blocks": -1},
        {"block_ratio": 0.0},
        {"z_loss": -1.0},
    ],
)
def test_configurations_that_contradict_themselves_are_refused(change):
    with pytest.raises(BadInputError):
        TokenShuffleConfig(**({"backbone_config": BACKBONES["llama"](), "grid": (4, 4)} | change))
