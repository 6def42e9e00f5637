"""Heads whose logits are scaled or capped: fused statistics and gradients are those of the model's own logits."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from everytoken.core.errors import UnsupportedModelError
from everytoken.core.implicit_reward import ImplicitReward
from everytoken.core.logprobs import LogitRule, token_stats
from everytoken.core.scoring import logit_rule, output_head, response_logps
from everytoken.testing.models import tiny_llama
from everytoken.training.scored_forward import add_scored_forward

SIZES = dict(
    vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
MODELS = {
    "Gemma2": (dict(head_dim=4, final_logit_softcapping=2.0, sliding_window=64), LogitRule(1.0, 2.0)),
    "Gemma3Text": (dict(head_dim=4, final_logit_softcapping=1.5, sliding_window=64), LogitRule(1.0, 1.5)),
    "Granite": (dict(logits_scaling=3.0), LogitRule(1 / 3, None)),
    "Cohere": (dict(logit_scale=0.25), LogitRule(0.25, None)),
    "Cohere2": (dict(logit_scale=0.25, sliding_window=64), LogitRule(0.25, None)),
    "Llama": (dict(), LogitRule()),
}


def built(name: str, seed: int = 0):
    settings, _ = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    torch.manual_seed(seed)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5)
    return model


IDS = torch.tensor([[1, 5, 9, 12, 7, 3], [1, 8, 8, 2, 4, 22]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()


def own_logps(model):
    logp = torch.log_softmax(model(input_ids=IDS).logits[:, :-1].float(), -1)
    return logp.gather(-1, IDS[:, 1:, None])[..., 0] * MASK[:, 1:]


@pytest.mark.parametrize("name", MODELS)
def test_fused_statistics_are_those_of_the_models_own_logits(name):
    model, reference = built(name), built(name, seed=1)
    rule = logit_rule(model)
    assert (rule.scale, rule.softcap) == (pytest.approx(MODELS[name][1].scale), MODELS[name][1].softcap)
    assert torch.allclose(response_logps(model, IDS, MASK)[:, 1:], own_logps(model).detach(), atol=1e-5)
    found = ImplicitReward(model, reference, 1.0).statistics(IDS, MASK, forward_kl=True)
    p, q = (torch.log_softmax(m(input_ids=IDS).logits[:, :-1].float(), -1) for m in (model, reference))
    kl = (q.exp() * (q - p)).sum(-1) * MASK[:, 1:]
    assert torch.allclose(found["forward_kl"][:, 1:], kl, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_models_own_logits(name):
    model = built(name)
    own_logps(model).sum().backward()
    expected = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    model.zero_grad()
    add_scored_forward(model)
    mask = MASK[:, 1:]
    score = {"mask": mask, "labels": IDS[:, 1:][mask], "needs": ()}
    model(input_ids=IDS, score=score).logps.sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.parametrize("rule", [LogitRule(0.3, None), LogitRule(1.0, 2.0), LogitRule(2.5, 1.3)], ids=str)
def test_every_statistic_and_its_gradient_follow_the_rule(rule):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((7, 5), (11, 5), (7, 5), (11, 5), (11,))
    )
    labels = torch.randint(0, 11, (7,), generator=generator)
    mix = torch.randn(4, 7, generator=generator)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_(True)

    def made(x):
        return rule.scale * x if rule.softcap is None else rule.softcap * torch.tanh(rule.scale * x / rule.softcap)

    p = torch.log_softmax(made(hidden @ weight.T + bias), -1)
    q = torch.log_softmax(made(ref_hidden @ ref_weight.T), -1)
    picks = torch.arange(7)
    plain = (
        p[picks, labels], -(p.exp() * p).sum(-1), (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1),
    )  # fmt: skip
    expected = torch.autograd.grad(sum((m * x).sum() for m, x in zip(mix, plain, strict=True)), (hidden, weight, bias))
    stats = token_stats(
        hidden, weight, labels, bias=bias, rule=rule, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_rule=rule,
        entropy=True, forward_kl=True, reverse_kl=True, chunk_size=3,
    )  # fmt: skip
    ours = (stats.logps, stats.entropy, stats.forward_kl, stats.reverse_kl)
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    found = torch.autograd.grad(sum((m * x).sum() for m, x in zip(mix, ours, strict=True)), (hidden, weight, bias))
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_an_adapter_on_the_head_is_refused_and_a_trained_copy_is_taken_in_its_context():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(UnsupportedModelError, match="adapter on its output head"):
        output_head(tuned)
    with tuned.disable_adapter():
        output_head(tuned)
    plain = tiny_llama()
    saved = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    with torch.no_grad():
        saved.get_output_embeddings().weight.mul_(1.5)
    assert torch.equal(output_head(saved).weight, plain.lm_head.weight * 1.5)
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, True, True, True]])
    found = ImplicitReward(saved, beta=1.0).statistics(ids, mask)
    assert torch.allclose(found["ref_logps"], response_logps(plain, ids, mask), atol=1e-6)
    assert not torch.allclose(found["logps"], found["ref_logps"], atol=1e-3)
