"""What networks of images share: schedules, norms, digits, tokenizers with identities, distances, and pictures."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from everytoken.architectures.images.adaptive import (
    AdaptiveLayerNorm,
    AdaptiveModulation,
    ClassEmbedding,
    TimeEmbedding,
)
from everytoken.architectures.images.data import check_labels, digit_batch, digit_images, digit_split, resized
from everytoken.architectures.images.drawing import growing
from everytoken.architectures.images.guidance import SCHEDULES, both_ways, drop_labels, guidance_scale, guide
from everytoken.architectures.images.metrics import (
    features_of,
    frechet_distance,
    frechet_interval,
    image_scores,
    nats_per_token,
)
from everytoken.architectures.images.pictures import (
    beside,
    half_blocks,
    image_html,
    png,
    shaded,
    slider,
    tiled,
    write_png,
)
from everytoken.architectures.images.tokenizers import (
    ImageTokenizerConfig,
    KLImageTokenizer,
    VQImageTokenizer,
    load_image_tokenizer,
    read_latents,
    save_latents,
)
from everytoken.core.errors import BadInputError, TokenizerMismatchError


# -- guidance ----------------------------------------------------------------------------------------------------------
def test_the_ramps_of_the_papers():
    ramp = [guidance_scale("linear", 2.7, n / 3) for n in range(4)]
    assert ramp == pytest.approx([1, 1.5667, 2.1333, 2.7], abs=1e-4)
    half = [guidance_scale("half-linear", 7.5, m / 8) for m in range(8)]
    assert half == pytest.approx([1, 2.625, 4.25, 5.875, 7.5, 7.5, 7.5, 7.5])
    assert guidance_scale("constant", 3.0, 0.0) == 3.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_scale_of_one_is_no_guidance(schedule):
    assert all(guidance_scale(schedule, 1.0, share) == 1 for share in (0.0, 0.3, 1.0))
    with_class, without = torch.randn(3, 5), torch.randn(3, 5)
    torch.testing.assert_close(guide(with_class, without, 1.0), with_class)
    torch.testing.assert_close(guide(with_class, without, 2.5), without + 2.5 * (with_class - without))


def test_guidance_refuses():
    for schedule, scale, share in (("steep", 1, 0), ("linear", -1, 0), ("linear", math.nan, 0), ("linear", 2, 1.5)):
        with pytest.raises(BadInputError):
            guidance_scale(schedule, scale, share)


def test_labels_are_dropped_as_often_as_asked():
    labels = torch.zeros(20_000, dtype=torch.long)
    dropped = drop_labels(labels, 10, 0.1, torch.Generator().manual_seed(0))
    assert set(dropped.unique().tolist()) == {0, 10}
    assert float((dropped == 10).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert drop_labels(labels, 10, 0.0) is labels
    assert both_ways(torch.tensor([1, 2]), 10).tolist() == [1, 2, 10, 10]


# -- adaptive norms ----------------------------------------------------------------------------------------------------
def test_a_norm_without_shift_and_scale_is_the_plain_one():
    torch.manual_seed(0)
    for rms in (False, True):
        norm = AdaptiveLayerNorm(4, 8, rms=rms)
        torch.nn.init.zeros_(norm.modulation.linear.weight)
        torch.nn.init.zeros_(norm.modulation.linear.bias)
        x = torch.randn(2, 3, 8)
        found = norm(x, torch.randn(2, 1, 4))
        wanted = x / x.square().mean(-1, keepdim=True).sqrt() if rms else torch.nn.functional.layer_norm(x, (8,))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert [item.shape[-1] for item in AdaptiveModulation(4, 8)(torch.randn(2, 4))] == [8] * 6
    assert ClassEmbedding(10, 4)(torch.tensor([10])).shape == (1, 4)


def test_times_are_floored_only_where_asked():
    torch.manual_seed(0)
    near = torch.tensor([0.5, 0.5004])
    floored, fine = TimeEmbedding(8, 16), TimeEmbedding(8, 16, floored=False)
    assert torch.equal(*floored(near)) and not torch.equal(*fine(near))
    assert floored.sinusoid(torch.zeros(1))[0].tolist() == [1.0] * 8 + [0.0] * 8
    with pytest.raises(BadInputError):
        TimeEmbedding(8, 15)


# -- data --------------------------------------------------------------------------------------------------------------
def test_held_out_digits_are_never_drawn():
    known, held = digit_split()
    assert len(held) == 500 and not set(known.tolist()) & set(held.tolist())
    images, labels = digit_images()
    assert images.shape == (1797, 1, 8, 8) and float(images.min()) == -1 and float(images.max()) == 1
    batch, digits = digit_batch(16, 3, 5)
    again, _ = digit_batch(16, 3, 5)
    assert torch.equal(batch, again) and digits.shape == (16,)
    assert torch.equal(resized(images[:2], 8), images[:2]) and resized(images[:2], 28).shape == (2, 1, 28, 28)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_labels_that_are_none():
    check_labels(torch.tensor([0, 9]), 10)
    for labels in (torch.tensor([10]), torch.tensor([-1]), torch.tensor([1.0]), torch.tensor(3), torch.tensor([True])):
        with pytest.raises(BadInputError):
            check_labels(labels, 10)


# -- measures ----------------------------------------------------------------------------------------------------------
def test_the_distance_of_normal_distributions():
    """In one dimension it is the squared difference of means plus that of deviations."""
    a = torch.tensor([[-1.0], [1.0]]).double()
    b = 3 * a + 5
    root = math.sqrt(2)
    assert frechet_distance(a, b) == pytest.approx(25 + (3 * root - root) ** 2)
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    turned, _ = torch.linalg.qr(torch.randn(6, 6))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    y = 1.5 * torch.randn(300, 6) + 0.2
    assert frechet_distance(x @ turned, y @ turned) == pytest.approx(frechet_distance(x, y), rel=1e-4)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-6)
    value, low, high = frechet_interval(x, y, draws=20)
    assert low < value < high
    with pytest.raises(BadInputError):
        frechet_distance(x, y[:, :3])


def test_draws_within_classes_keep_their_shares():
    """Two far classes: drawing their shares anew moves the mean, drawing within them does not."""
    torch.manual_seed(0)
    groups = torch.arange(200) % 2
    x, y = (torch.randn(200, 2) + 100.0 * groups[:, None] for _ in range(2))
    free, within = frechet_interval(x, y, 20), frechet_interval(x, y, 20, classes=(groups, groups))
    assert free[0] == within[0] and within[2] - within[0] < 0.2 * (free[2] - free[0])
    with pytest.raises(BadInputError):
        frechet_interval(x, y, 20, classes=(groups, groups[:3]))


def test_the_classifier_reads_held_out_digits_and_sees_noise():
    images, labels = digit_images()
    held = digit_split()[1]
    _, logits = features_of(images[held])
    assert float((logits.argmax(-1) == labels[held]).float().mean()) > 0.97
    real = image_scores(images[held], labels[held], draws=5)
    torch.manual_seed(0)
    noise = image_scores(torch.randn(500, 1, 8, 8).clamp(-1, 1), labels[held], draws=5)
    assert real.frechet == pytest.approx(real.floor) and real.accuracy > 0.97
    assert noise.frechet > 20 * noise.floor and noise.accuracy < 0.5
    with pytest.raises(BadInputError):
        features_of(torch.full((2, 1, 8, 8), math.nan))
    with pytest.raises(BadInputError):
        image_scores(images[:3], labels[:2])


def test_nats():
    assert nats_per_token(torch.tensor([-1.0, -3.0])) == 2
    assert nats_per_token(torch.tensor([-1.0, -3.0]), torch.tensor([True, False])) == 1
    with pytest.raises(BadInputError):
        nats_per_token(torch.zeros(2), torch.zeros(2))


# -- tokenizers --------------------------------------------------------------------------------------------------------
def small(kind, seed=0):
    torch.manual_seed(seed)
    config = ImageTokenizerConfig(kind=kind, image_size=8, halvings=1, width=8, latent_channels=3, codes=5)
    return (KLImageTokenizer if kind == "kl" else VQImageTokenizer)(config).eval()


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_latents_of_another_tokenizer_are_refused(kind, tmp_path):
    first, second = small(kind), small(kind, 1)
    images, labels = digit_images()
    tokens = first.encode(images[:3])
    assert tokens.shape == ((3, 3, 4, 4) if kind == "kl" else (3, 4, 4))
    assert first.decode(tokens, made_by=first.identity).shape == (3, 1, 8, 8)
    with pytest.raises(TokenizerMismatchError, match=first.identity):
        second.decode(tokens, made_by=first.identity)
    path = tmp_path / "latents.safetensors"
    save_latents(path, tokens, labels[:3], first.identity)
    again, digits = read_latents(path, first.identity)
    assert torch.equal(again, tokens) and torch.equal(digits, labels[:3])
    with pytest.raises(TokenizerMismatchError):
        read_latents(path, second.identity)
    with pytest.raises(BadInputError):
        read_latents(tmp_path / "nothing", first.identity)
    first.save_pretrained(tmp_path / "saved")
    assert load_image_tokenizer(tmp_path / "saved").identity == first.identity


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_every_weight_of_a_tokenizer_learns(kind):
    model = small(kind).train()
    model(digit_images()[0][:16]).backward()
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in model.parameters())


def test_codes():
    model = small("vq")
    vectors = torch.randn(2, 3, 4, 4)
    apart = (vectors.permute(0, 2, 3, 1)[..., None, :] - model.codebook.weight).square().sum(-1)
    assert torch.equal(model.nearest(vectors), apart.argmin(-1))
    with torch.no_grad():
        model.codebook.weight[1:] = 100.0
    assert model.revive(digit_images()[0][:8]) == 4
    for codes in (torch.full((1, 4, 4), 5), torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(1, 4, 4)):
        with pytest.raises(BadInputError):
            model.decode(codes)
    with pytest.raises(BadInputError):
        model.encode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("wrong", [{"kind": "jpeg"}, {"halvings": 9}, {"width": 12}, {"codes": 0}])
def test_settings_of_tokenizers(wrong):
    with pytest.raises(BadInputError):
        ImageTokenizerConfig(**wrong)


# -- pictures ----------------------------------------------------------------------------------------------------------
def test_a_png_holds_the_pixels():
    image = torch.tensor([[-1.0, 1.0, 0.0]])
    data = png(image, 2)
    assert data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    assert int.from_bytes(data[16:20], "big") == 6 and int.from_bytes(data[20:24], "big") == 2
    at = data.index(b"IDAT")
    body = zlib.decompress(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")])
    line = bytes([0] + [0] * 6 + [255] * 6 + [128] * 6)
    assert body == line * 2


def test_pictures_in_the_terminal():
    image = torch.tensor([[-1.0, 1.0], [0.0, -1.0]])
    assert shaded(image) == "  ██\n▒▒"
    assert half_blocks(image).count("▀") == 2 and "38;2;255;255;255m" in half_blocks(image)
    assert beside(["a\nb", "c"], 1) == "a c\nb"
    frames = [image[None]] * 9
    text = growing(frames, [f"{number}" for number in range(9)], colour=False)
    assert text.split("\n")[0].split() == ["0", "2", "3", "5", "6", "8"]
    assert "\x1b[" in growing(frames, ["step"] * 9, colour=True)


def test_pictures_of_a_page(tmp_path):
    images = torch.zeros(3, 1, 2, 2)
    assert tiled(images, 2).shape == (1, 5, 5)
    page = slider(list(images), ["<a>", "b", "c"], "grows")
    assert page.count("<img") == 3 and page.count("hidden>") == 2 and "&lt;a&gt;" in page
    assert image_html(images[0], '"').count("&quot;") == 1
    write_png(images[0], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == png(images[0])
    for wrong in (lambda: write_png(images[0], tmp_path / "a.jpg"), lambda: slider([], [], ""), lambda: png(images),
                  lambda: png(torch.full((2, 2), math.nan)), lambda: tiled(images[:0])):  # fmt: skip
        with pytest.raises(BadInputError):
            wrong()
