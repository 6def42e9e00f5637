"""PlainMamba: its layer against a loop, its symmetries, its count of weights, and images that it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from everytoken.architectures.grid import MOVES, scan_orders
from everytoken.architectures.plainmamba.configuration_plainmamba import PlainMambaConfig
from everytoken.architectures.plainmamba.encoder import encoder_config
from everytoken.architectures.plainmamba.method import PlainMamba
from everytoken.architectures.plainmamba.modeling_plainmamba import PlainMambaMixer, PlainMambaModel
from everytoken.architectures.plainmamba.pictures import picture_of
from everytoken.architectures.plainmamba.training import PlainMambaTraining, folder_of, run
from everytoken.architectures.selective import Scans, SelectiveSSM
from everytoken.core.errors import BadInputError
from everytoken.training.base import TrainingContext
from everytoken.training.datasets.scenes import SceneMaker, question_batch
from everytoken.training.vision import ask_all, image_features, new_vlm

SMALL = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}


def ssm(channels=6, states=3, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    module = SelectiveSSM(channels, states, 2)
    module.init_weights()
    with torch.no_grad():
        module.dt_proj.bias.normal_()
        module.D.normal_()
    return module.to(dtype)


def scans_of(height, width, kind="snake", chosen=(0, 1, 2, 3)):
    return Scans(*(item[list(chosen)] for item in scan_orders(height, width, kind)))


def by_loop(module, x, scans, theta, permute=True, double=False):
    """The layer's scans token by token, as the paper writes them."""
    raw = x @ module.x_proj.weight.T
    rank, n = module.time_step_rank, module.ssm_state_size
    steps = raw[..., :rank] @ module.dt_proj.weight.T + module.dt_proj.bias * (2 if double else 1)
    delta, b, c = F.softplus(steps), raw[..., rank : rank + n], raw[..., rank + n :]
    A, total = -torch.exp(module.A_log), torch.zeros_like(x)
    for order, moves in zip(scans.orders, scans.moves, strict=True):
        h = x.new_zeros(len(x), x.shape[2], n)
        for t, token in enumerate(order.tolist()):
            at = token if permute else t
            into = b[:, at] + (0 if theta is None else theta[moves[t]])
            h = torch.exp(delta[:, at, :, None] * A) * h + (delta[:, at] * x[:, token])[..., None] * into[:, None]
            total[:, token] = total[:, token] + (h * c[:, at, None]).sum(-1) + module.D * x[:, token]
    return total


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["snake", "raster"])
def test_a_layer_is_the_loop_in_value_and_gradient(permute, double, kind):
    module, x = ssm(), torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)
    theta = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    scans, weights = scans_of(3, 4, kind), torch.randn(2, 12, 6, dtype=torch.float64)
    learned = [x, theta, *module.parameters()]
    found, wanted = module(x, scans, theta, permute, double), by_loop(module, x, scans, theta, permute, double)
    assert torch.allclose(found, wanted, atol=1e-6)  # delta and A are made in float32
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), learned),
        torch.autograd.grad((wanted * weights).sum(), learned),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=2e-5)


def test_the_released_order_of_parameters_agrees_only_where_it_must():
    module = ssm()
    for height, width, chosen, same in (
        (1, 6, (0,), True),
        (6, 1, (2,), True),
        (3, 4, (0,), False),
        (1, 6, (1,), False),
    ):
        x, scans = torch.randn(1, height * width, 6, dtype=torch.float64), scans_of(height, width, chosen=chosen)
        assert torch.allclose(module(x, scans), module(x, scans, permute_parameters=False)) == same
    with torch.no_grad():  # steps, B and C that are the same for all tokens
        module.x_proj.weight.zero_()
    x, scans = torch.randn(1, 12, 6, dtype=torch.float64), scans_of(3, 4)
    assert torch.allclose(module(x, scans), module(x, scans, permute_parameters=False))


def test_the_bias_of_the_steps_twice_is_another_network():
    module, x, scans = ssm(), torch.randn(1, 12, 6, dtype=torch.float64), scans_of(3, 4)
    once, twice = module(x, scans), module(x, scans, double_bias=True)
    assert not torch.allclose(once, twice)
    with torch.no_grad():
        module.dt_proj.bias.mul_(2)
    assert torch.allclose(module(x, scans), twice, atol=1e-6)


def test_without_b_only_the_skip_is_left_four_times():
    module, v = ssm(), torch.randn(2, 12, 6, dtype=torch.float64)
    with torch.no_grad():
        module.x_proj.weight[2:5] = 0
    assert torch.allclose(module(v, scans_of(3, 4)), 4 * module.D * v)
    minus = torch.zeros(5, 3, dtype=torch.float64)
    assert torch.allclose(module(v, scans_of(3, 4), minus), 4 * module.D * v)


def test_a_scan_does_not_see_what_comes_later():
    module, x, scans = ssm(), torch.randn(1, 12, 6, dtype=torch.float64), scans_of(3, 4, chosen=(0,))
    theta = torch.randn(5, 3, dtype=torch.float64)
    before = module(x, scans, theta)
    for t in (3, 7, 11):
        changed, order = x.clone(), scans.orders[0]
        changed[:, order[t]] += 1
        after = module(changed, scans, theta)
        assert torch.equal(after[:, order[:t]], before[:, order[:t]])
        assert not torch.allclose(after[:, order[t]], before[:, order[t]])


@pytest.mark.parametrize("side", [1, 3, 4])
def test_a_transposed_square_gives_the_transposed_output(side):
    module, x = ssm(), torch.randn(1, side * side, 6, dtype=torch.float64)
    theta, scans = torch.randn(5, 3, dtype=torch.float64), scans_of(side, side)

    def turned(item):
        return item.unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)

    swapped = theta[[MOVES.index(name) for name in ("begin", "down", "up", "left", "right")]]
    assert torch.allclose(module(turned(x), scans, swapped), turned(module(x, scans, theta)), atol=1e-12)


@pytest.mark.parametrize(("height", "width", "same"), [(3, 3, True), (3, 5, True), (4, 4, False), (4, 5, False)])
def test_half_a_turn_gives_the_turned_output_for_odd_sides_only(height, width, same):
    module, x = ssm(), torch.randn(1, height * width, 6, dtype=torch.float64)
    theta, scans = torch.randn(5, 3, dtype=torch.float64), scans_of(height, width)
    swapped = theta[[MOVES.index(name) for name in ("begin", "left", "right", "down", "up")]]
    found = module(x.flip(1), scans, swapped)
    assert torch.allclose(found, module(x, scans, theta).flip(1), atol=1e-12) == same


def test_weights_of_a_layer_are_as_many_as_the_paper_has():
    config = PlainMambaConfig()
    d, e, n, r = 192, 384, 16, 12
    wanted = 2 * d * e + 2 * e + 49 * e + e + e * (r + 2 * n) + r * e + e + e * n + e + e * d + d + 5 * n
    assert sum(weight.numel() for weight in PlainMambaMixer(config).parameters()) == wanted == 269_840


def test_weights_begin_as_the_paper_says():
    torch.manual_seed(0)
    model = PlainMambaModel(PlainMambaConfig(**SMALL, dwconv_layers=[]))
    part = model.layers[1].mixer.ssm
    assert torch.allclose(part.A_log.exp(), torch.arange(1.0, 5.0).expand(32, -1))
    assert torch.equal(part.D, torch.ones(32))
    steps = F.softplus(part.dt_proj.bias)
    assert steps.min() >= 1e-4 and steps.max() <= 0.1001 and steps.std() > 0.01
    assert model.layers[0].mixer.direction.abs().max() < 0.1 and not model.layers[0].mixer.in_proj.bias.any()


def test_other_sizes_resize_the_positions():
    model = PlainMambaModel(PlainMambaConfig(**SMALL)).eval()
    output = model(torch.randn(1, 3, 8, 24), output_hidden_states=True)
    assert output.last_hidden_state.shape == (1, 12, 16) and output.pooler_output.shape == (1, 16)
    assert len(output.hidden_states) == 3 and torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.allclose(output.pooler_output, output.last_hidden_state.mean(1))
    square = torch.randn(1, 3, 16, 16)
    assert torch.equal(model.embeddings.positions((4, 4)), model.embeddings.position_embeddings)
    assert len(model(square, return_dict=False)) == 2
    model(torch.randn(2, 3, 4, 4)), model(torch.randn(2, 3, 4, 16)), model(torch.randn(2, 3, 16, 4))


def test_drop_path_drops_whole_layers_of_rows_in_training():
    torch.manual_seed(0)
    model = PlainMambaModel(PlainMambaConfig(**SMALL, dwconv_layers=[], drop_path_rate=0.5))
    layer, x, scans = model.layers[1], torch.randn(64, 16, 16), model.scans((4, 4))
    found, whole = layer.train()(x, (4, 4), scans) - x, layer.eval()(x, (4, 4), scans) - x
    dropped = (found == 0).flatten(1).all(1)
    assert 16 < int(dropped.sum()) < 48
    assert torch.allclose(found[~dropped], 2 * whole[~dropped], atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 16, 16), torch.zeros(1, 1, 16, 16), torch.zeros(1, 3, 16, 18), torch.zeros(0, 3, 16, 16),
     torch.zeros(1, 3, 16, 16, dtype=torch.long), torch.zeros(1, 3, 0, 16)],
)  # fmt: skip
def test_images_that_do_not_fit_are_refused(images):
    with pytest.raises(BadInputError):
        PlainMambaModel(PlainMambaConfig(**SMALL))(images)


@pytest.mark.parametrize(
    "change",
    [
        {"scan": "spiral"},
        {"patch_size": 3},
        {"patch_size": 5},
        {"conv_kernel": 4},
        {"scans": []},
        {"scans": [0, 0]},
        {"scans": [4]},
        {"dwconv_layers": [2]},
        {"drop_path_rate": 1.0},
        {"state_size": 0},
    ],
)
def test_configurations_that_contradict_themselves_are_refused(change):
    with pytest.raises(BadInputError):
        PlainMambaConfig(**(SMALL | change))


# -- as the encoder of a vision-language model -------------------------------------------------------------------------
def test_it_is_the_encoder_of_the_tiny_vision_language_model(tmp_path):
    config = encoder_config(size=32, patch=8, hidden=16)
    model = new_vlm(config)
    scenes = SceneMaker(size=32, side=8, least=1, most=2).draw(2, 0)
    batch = question_batch(scenes, ask_all(scenes, 0, count=2), 16)
    output = model(**batch)
    output.loss.backward()
    assert all(weight.grad is not None for name, weight in model.model.vision_tower.named_parameters()), (
        "no gradient reaches the encoder"
    )
    model.eval()
    features = image_features(model, batch["pixel_values"])
    assert features.shape == (2, 16, 16)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert isinstance(again.model.vision_tower, PlainMambaModel)
    assert torch.equal(image_features(again, batch["pixel_values"]), features)
    prompt = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    assert again.generate(**prompt, max_new_tokens=2, do_sample=False).shape[1] == batch["input_ids"].shape[1] + 2


# -- command line ------------------------------------------------------------------------------------------------------
def test_a_text_names_a_picture():
    image, shape = picture_of("a red ring", 32)
    assert image.shape == (1, 3, 32, 32) and shape == "ring"
    assert torch.equal(image, picture_of("a red ring", 32)[0])
    assert image[0, 0].max() > 2 and image[0, 1:].max() < 1.2  # the strokes of the ground are grey
    for text in ("hello", "a disc and a bar", "red green disc", "no-such.png"):
        with pytest.raises(BadInputError):
            picture_of(text, 32)


def test_an_image_file_is_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (50, 20), (255, 0, 0)).save(tmp_path / "a.png")
    pixels, shape = picture_of(str(tmp_path / "a.png"), 16)
    assert pixels.shape == (1, 3, 16, 16) and shape is None
    assert torch.allclose(pixels[0, :, 3, 3], torch.tensor([3.0, -1.0, -1.0]))
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(BadInputError, match="no image that can be read"):
        picture_of(str(tmp_path / "b.png"), 16)


def test_the_trace_tells_places_and_moves():
    model = PlainMamba.tiny()
    model.config.id2label = dict(enumerate(("square", "disc", "triangle", "cross", "ring", "bar")))
    seen = PlainMamba("raster").observe(model, None, "blue bar")
    assert model.config.scan == "snake"
    trace = seen.traces[0]
    assert trace.columns["place"] == list(range(16))
    assert trace.columns["move"] == ["begin", "right", "right", "right"] * 4
    snake = PlainMamba().observe(model, None, "blue bar").traces[0]
    assert snake.columns["place"][:8] == [0, 1, 2, 3, 7, 6, 5, 4]
    with pytest.raises(BadInputError):
        PlainMamba("spiral")


def test_a_training_writes_model_and_report_and_goes_on(tmp_path):
    config = PlainMambaTraining(steps=3, batch=4, size=16, width=16, layers=1, states=2)
    result = run(config, TrainingContext(None, None, tmp_path))
    assert 0 <= result.figures["right answers"] <= 1
    assert (tmp_path / "report.html").read_text(encoding="utf-8").count("<img") >= 2
    assert PlainMamba.load(str(tmp_path / "model")).config.id2label[4] == "ring"
    with pytest.raises(BadInputError, match="from scratch"):
        run(config, TrainingContext("model", None, tmp_path))


def test_a_folder_of_classes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (tmp_path / name).mkdir()
        for number in range(10):
            image.new("RGB", (8, 8), colour).save(tmp_path / name / f"{number}.png")
    classes, draw = folder_of(PlainMambaTraining(size=16), tmp_path)
    images, labels = draw(6, 0)
    assert classes == ("blue", "red") and images.shape == (6, 3, 16, 16)
    assert torch.equal(images[:, 0, 0, 0] > 0, labels == 1)
    assert len(draw(9, -1)[0]) == 2
    with pytest.raises(BadInputError, match="classes"):
        folder_of(PlainMambaTraining(size=16), tmp_path / "red")
