"""MrT5 against the T5 that it is, soft deletion against hard, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration, TrainingArguments
from transformers import Trainer as HFTrainer

from everytoken.architectures.mrt5.configuration_mrt5 import MrT5Config
from everytoken.architectures.mrt5.deletion import DeletionController
from everytoken.architectures.mrt5.method import MrT5
from everytoken.architectures.mrt5.modeling_mrt5 import MrT5ForConditionalGeneration
from everytoken.core.errors import BadInputError, UnsupportedModelError

SHAPE = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 3, "num_heads": 4}
SHAPE |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "initializer_factor": 0.3}


def network(seed=0, **settings):
    torch.manual_seed(seed)
    return MrT5ForConditionalGeneration(MrT5Config(**SHAPE | {"delete_gate_layer": 1} | settings)).eval()


def texts(lengths=(12, 7), seed=0):
    """Ids padded on the right, their mask, and labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": torch.randint(3, 64, (len(lengths), 5), generator=generator),
    }


@torch.no_grad()
def test_without_deletion_and_with_plain_softmax_it_is_t5():
    ours = network(softmax_1=False)
    t5 = T5ForConditionalGeneration(T5Config(**SHAPE)).eval()
    missing = t5.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.missing_keys and all("delete_gate" in name for name in missing.unexpected_keys)
    inputs = texts()
    wanted = t5(**inputs)
    for hard in (False, True):
        found = ours(**inputs, delete_gate=torch.zeros(2, 12), hard_delete=hard)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.loss, wanted.loss)


@pytest.mark.parametrize("softmax", [False, True])
@torch.no_grad()
def test_soft_deletion_nears_hard_as_the_scale_grows(softmax):
    inputs, chosen = texts(), torch.rand(2, 12, generator=torch.Generator().manual_seed(3)) < 0.5
    chosen[:, 0] = False
    gaps = []
    for scale in (-5.0, -10.0, -30.0, -1e4):
        model = network(softmax_1=softmax, delete_gate_scale=scale)
        gate = torch.where(chosen, scale, 0.0)
        soft, hard = (model(**inputs, delete_gate=gate, hard_delete=way).logits for way in (False, True))
        gaps.append(float((soft - hard).abs().max()))
    assert gaps[0] > gaps[1] > gaps[2]
    assert max(gaps[2:]) < 1e-5


@torch.no_grad()
def test_hard_deletion_one_by_one_is_the_batch():
    model, inputs = MrT5.tiny(), texts((12, 9, 5))
    together = model(**inputs)
    assert len({int((row >= 0).sum()) for row in together.kept_positions}) > 1, "choose rows that keep unequal counts"
    for row, length in enumerate((12, 9, 5)):
        alone = model(inputs["input_ids"][row : row + 1, :length], labels=inputs["labels"][row : row + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[row], rtol=1e-4, atol=1e-5)
        kept = together.kept_positions[row]
        assert alone.kept_positions[0].tolist() == kept[kept >= 0].tolist()


def test_the_gate_learns_in_soft_mode_and_the_loss_has_its_terms():
    model, inputs = network(scores_weight=0.0), texts()
    model.train()
    model.deletion_weight = 0.0
    plain = model(**inputs)
    plain.loss.backward()
    assert model.encoder.delete_gate.linear.weight.grad.abs().sum() > 0
    model.deletion_weight = 2.0
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).loss, plain.loss + 2.0 * plain.delete_gate[real].mean())
    assert (plain.delete_gate[~real] == -30).all()
    assert float(network().encoder.delete_gate.linear.bias.detach()) == 1  # a new gate keeps: G is about -8.07
    model.eval()
    torch.testing.assert_close(model(**inputs, hard_delete=False).loss, plain.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_the_scores_loss_counts_what_lies_above_five(way):
    model, inputs = network(), texts((12, 12))
    model.set_attn_implementation(way)
    model.train()
    plain = model(**inputs).loss
    model.config.scores_weight = 0.5
    assert model(**inputs).loss - plain == 0  # small weights: no score is above five
    with torch.no_grad():
        for block in model.decoder.block:
            block.layer[1].EncDecAttention.q.weight.mul_(300)
    excess = []
    for block in model.decoder.block:
        attention = block.layer[1].EncDecAttention

        def hook(module, arguments, keywords, output):
            heads = lambda x: x.view(*x.shape[:2], -1, 4).transpose(1, 2)  # noqa: E731
            query, key = heads(module.q(arguments[0])), heads(module.k(keywords["key_value_states"]))
            excess.append(((query @ key.transpose(2, 3)).clamp_min(5) - 5).mean())

        attention.register_forward_hook(hook, with_kwargs=True)
    loss = model(**inputs).loss
    model.config.scores_weight = 0.0
    rest = model(**inputs).loss
    assert loss - rest > 1e-4
    # encoder blocks 1 and 2 have none above five, and count as zeros in the mean over 2 + 3 attentions
    torch.testing.assert_close(loss - rest, 0.5 * sum(excess[:3]) / 5, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_generation_reads_what_the_encoder_left():
    model, inputs = MrT5.tiny(), texts((12, 6))
    del inputs["labels"]
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for hard in (False, True):
        batch = model.generate(**inputs, **arguments, hard_delete=hard)
        for row, length in enumerate((12, 6)):
            alone = model.generate(inputs["input_ids"][row : row + 1, :length], **arguments, hard_delete=hard)
            assert alone[0].tolist() == batch[row].tolist()
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3)
    assert beams.shape[0] == 2


@pytest.mark.slow
def test_the_soft_forward_compiles_into_one_graph():
    model, inputs = network(), texts()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(**inputs, hard_delete=False).logits, model(**inputs, hard_delete=False).logits
        )


@pytest.mark.slow
def test_the_controller_moves_alpha_in_a_trainer(tmp_path):
    model, inputs = network(), texts((12, 12))
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    control = DeletionController(target=0.5, k_p=5.0)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    HFTrainer(model, arguments, train_dataset=rows, callbacks=[control]).train()
    assert model.deletion_weight > 0
    assert model.deletion_weight == max(0.0, control.proportional + control.integral)


def test_configurations_that_contradict_themselves():
    for settings in (
        {"delete_gate_layer": 3},
        {"delete_gate_layer": -1},
        {"delete_gate_scale": 0.0},
        {"delete_threshold": 0.0},
        {"delete_threshold": -40.0},
        {"deletion_weight": -1.0},
        {"scores_weight": -1.0},
    ):
        with pytest.raises(BadInputError):
            MrT5Config(**SHAPE | {"delete_gate_layer": 1} | settings)
    assert MrT5Config().threshold == -15
    assert MrT5Config(delete_threshold=-5.0).threshold == -5


def test_bad_input_is_refused():
    model, inputs = network(), texts()
    with pytest.raises(BadInputError, match="one of them"):
        model(labels=inputs["labels"])
    with pytest.raises(BadInputError, match="attention_mask must be"):
        model(inputs["input_ids"], attention_mask=torch.ones(2, 3), labels=inputs["labels"])
    with pytest.raises(BadInputError, match="delete_gate must be"):
        model(**inputs, delete_gate=torch.zeros(2, 3))
    with pytest.raises((UnsupportedModelError, ValueError), match="eager or sdpa"):
        model.set_attn_implementation("flex_attention")
    model.config.scores_weight = 0.5
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(BadInputError, match="gradient checkpointing"):
        model(**inputs)
