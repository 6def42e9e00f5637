"""T-REG's equation, limits and gradients, and rewards from contrastive prompts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from everytoken.core.errors import BadInputError
from everytoken.preference.base import Example, PreferenceLoss, TokenAnnotator
from everytoken.preference.dpo import DPOLoss
from everytoken.preference.t_reg import ContrastivePromptRewards, TREGLoss

from ..conftest import tiny_llama
from .problems import evaluate, log_ratio, pairs

SEEDS = st.integers(0, 200)


def problem(seed=0):
    work = pairs(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return *work, {"token_reward": torch.rand(work[2].shape, generator=generator, dtype=torch.float64) - 0.5}


def test_contract():
    assert isinstance(TREGLoss(), PreferenceLoss)
    assert isinstance(ContrastivePromptRewards(tiny_llama(), None), TokenAnnotator)


@given(seed=SEEDS, beta=st.floats(0.01, 2))
@settings(max_examples=25, deadline=None)
def test_alpha_zero_or_equal_prompts_are_dpo_in_value_and_gradient(seed, beta):
    work = problem(seed)
    theirs, expected = evaluate(DPOLoss(beta=beta), *work[:4])
    zero = {"token_reward": torch.zeros_like(work[4]["token_reward"])}  # x+ == x- makes q = 0
    for loss, columns in ((TREGLoss(beta=beta, alpha=0.0), work[4]), (TREGLoss(beta=beta, alpha=0.4), zero)):
        ours, grad = evaluate(loss, *work[:4], columns)
        assert torch.allclose(ours.losses, theirs.losses)
        assert torch.allclose(grad, expected)


@given(seed=SEEDS, beta=st.floats(0.05, 1), alpha=st.floats(0.05, 1))
@settings(max_examples=25, deadline=None)
def test_the_regularisers_gradient_in_the_logps_is_minus_v_beta_q(seed, beta, alpha):
    policy, reference, labels, mask, columns = problem(seed)
    u = log_ratio(policy, reference, labels, mask)
    h = beta * u
    v = torch.sigmoid(h[1].sum(-1) - h[0].sum(-1)).detach()
    regulariser = -v * ((columns["token_reward"] * h).sum(-1).sum(0))
    output, grad = evaluate(TREGLoss(beta=beta, alpha=alpha), policy, reference, labels, mask, columns)
    dpo, dpo_grad = evaluate(DPOLoss(beta=beta), policy, reference, labels, mask)
    assert torch.allclose(output.losses, dpo.losses + alpha * regulariser.float(), atol=1e-5)
    # d L_reg / d log pi(y_t) = -v beta q_t; then through the log-softmax
    upstream = -v[:, None] * beta * columns["token_reward"] * mask * alpha / len(v)
    (expected,) = torch.autograd.grad(u, policy, upstream)
    assert torch.allclose(grad - dpo_grad, expected, atol=1e-6)


def test_options():
    policy, reference, labels, mask, columns = problem(5)
    u = log_ratio(policy, reference, labels, mask).detach()
    h, q = 0.1 * u, columns["token_reward"]
    mean = (q * h).sum(-1) / mask.sum(-1).clamp(min=1)
    output, _ = evaluate(
        TREGLoss(pair_weight="none", reduction="mean", alpha=1.0), policy, reference, labels, mask, columns
    )
    expected = -F.logsigmoid(h[0].sum(-1) - h[1].sum(-1)) - mean.sum(0)
    assert torch.allclose(output.losses, expected.float(), atol=1e-5)
    assert output.metrics["pair_weight"].item() == 1


def test_simpo_has_no_reference_and_is_normalised_by_length():
    policy, reference, labels, mask, columns = problem(6)
    other = torch.zeros_like(reference)
    loss = TREGLoss(base="simpo", beta=2.0, gamma=0.5, alpha=0.3)
    one, _ = evaluate(loss, policy, reference, labels, mask, columns)
    two, _ = evaluate(loss, policy, other, labels, mask, columns)
    assert torch.allclose(one.losses, two.losses)
    logp = torch.log_softmax(policy.detach(), -1).gather(-1, labels[..., None])[..., 0] * mask
    h = 2.0 * logp / mask.sum(-1, keepdim=True).clamp(min=1)
    margin = h[0].sum(-1) - h[1].sum(-1) - 0.5
    expected = -F.logsigmoid(margin) - 0.3 * torch.sigmoid(-margin) * (columns["token_reward"] * h).sum(-1).sum(0)
    assert torch.allclose(one.losses, expected.float(), atol=1e-5)


def test_bad_settings():
    for setting in (dict(base="ppo"), dict(pair_weight="x"), dict(reduction="max"), dict(beta=0), dict(alpha=-1)):
        with pytest.raises(BadInputError):
            TREGLoss(**setting)


# -- contrastive prompts
# -------------------------------------------------------------------------------------------------
EXAMPLES = [
    Example("The film was", [5, 6, 7], [8, 9, 10, 11]),
    Example("My day", [3, 4], [12, 13]),
    Example("So", [2, 9, 9, 4, 1], [14]),
]


def rewards(tokenizer, **settings_):
    return ContrastivePromptRewards(tiny_llama(49152, seed=3), tokenizer, **settings_)


def test_q_is_the_contrast_of_the_same_ids_under_both_instructions(embedded_tokenizer):
    annotator = rewards(embedded_tokenizer, better="Be kind. ", worse="Be rude! ")
    found = annotator.annotate(EXAMPLES)
    for example, values in zip(EXAMPLES, found, strict=True):
        assert len(values) == len(example.response_ids)
        sums = []
        for instruction in ("Be kind. ", "Be rude! "):
            ids = [
                *embedded_tokenizer(instruction)["input_ids"], *example.prompt_ids, *example.response_ids
            ]  # fmt: skip
            logits = annotator.model(torch.tensor([ids])).logits[0].detach()
            logp = torch.log_softmax(logits, -1)
            start = len(ids) - len(example.response_ids)
            sums.append(torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))]))
        assert torch.allclose(values, torch.sigmoid(sums[0] - sums[1]) - 0.5, atol=1e-5)
        assert (values.abs() < 0.5).all()
        assert values.abs().max() > 1e-4


def test_swapping_the_instructions_flips_the_sign_and_equal_ones_give_zero(embedded_tokenizer):
    one = rewards(embedded_tokenizer, better="Be kind. ", worse="Be rude! ")
    other = rewards(embedded_tokenizer, better="Be rude! ", worse="Be kind. ")
    same = rewards(embedded_tokenizer, better="Be kind. ", worse="Be kind. ")
    for up, down, zero in zip(*(item.annotate(EXAMPLES) for item in (one, other, same)), strict=True):
        assert torch.allclose(up, -down, atol=1e-6)
        assert torch.allclose(zero, torch.zeros_like(zero), atol=1e-7)
    assert one.fingerprint() != other.fingerprint()
    assert one.fingerprint() == rewards(embedded_tokenizer, better="Be kind. ", worse="Be rude! ").fingerprint()


def test_long_prompts_lose_prompt_tokens_only(embedded_tokenizer):
    annotator = rewards(embedded_tokenizer, max_prompt_length=6)
    head = embedded_tokenizer("Be kind. ")["input_ids"]
    ids = annotator.wrap(Example("x", list(range(100, 140)), [1]), "Be kind. ")
    assert ids[: len(head)] == head
    assert len(ids) == max(6, len(head) + 1)
    assert ids[-1] == 139
    assert [len(item) for item in annotator.annotate(EXAMPLES)] == [4, 2, 1]


def conversation(tokenizer, messages, tools=None, behind=0, **template):
    """An example as TRL tokenizes it; ``behind`` tokens of the generation prompt belong to the answer."""
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tools=tools, return_dict=True, **template
    )["input_ids"]  # fmt: skip
    return Example(messages, ids[: len(ids) - behind], [9, 8, 7], tools, template or None)


def test_the_instruction_joins_the_users_system_message_or_the_templates_own(embedded_tokenizer):
    annotator = rewards(embedded_tokenizer)
    hello = [{"role": "user", "content": "Hello"}]
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert own in embedded_tokenizer.apply_chat_template(hello, tokenize=False)
    text = embedded_tokenizer.decode(annotator.wrap(conversation(embedded_tokenizer, hello), "Be kind."))
    assert f"Be kind.\n\n{own}" in text.split("Hello")[0]
    kept = [{"role": "system", "content": "You are a pirate."}, *hello]
    text = embedded_tokenizer.decode(annotator.wrap(conversation(embedded_tokenizer, kept), "Be kind."))
    assert "Be kind.\n\nYou are a pirate." in text
    assert own not in text


TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
TEMPLATE = (
    "{% set first = messages[0] %}{% if first.role == 'system' or tools %}<system>"
    "{{ first.content if first.role == 'system' else 'I am Template.' }}"
    "{% if tools %}{{ '\nTools: ' }}{{ tools | tojson }}{% endif %}</system>{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{{ mood }}{% endif %}"
)


def test_tools_and_the_settings_of_a_rows_template_stay(embedded_tokenizer):
    import copy
    import json

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = TEMPLATE
    hello = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    plain = [{"role": "user", "content": "Hello"}]
    example = conversation(tokenizer, plain, TOOLS, mood="(calm)")
    example.prompt = hello
    text = tokenizer.decode(rewards(tokenizer).wrap(example, "Be kind."))
    assert text.startswith("<system>Be kind.\n\nI am Template.\nTools: ")
    assert "get_weather" in text
    assert text.endswith("<user>Hello</user><assistant>(calm)")
    example.tools = json.dumps(TOOLS)  # as TRL's datasets have it
    assert tokenizer.decode(rewards(tokenizer).wrap(example, "Be kind.")) == text
    short = conversation(tokenizer, plain, TOOLS, behind=2, mood="(calm)")  # the answer begins in the generation prompt
    whole = rewards(tokenizer).wrap(conversation(tokenizer, plain, TOOLS, mood="(calm)"), "Be kind.")
    assert rewards(tokenizer).wrap(short, "Be kind.") == whole[:-2]


def test_a_template_without_system_messages_gets_the_instruction_in_the_first(embedded_tokenizer):
    import copy

    tokenizer = copy.deepcopy(embedded_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = conversation(tokenizer, [{"role": "user", "content": "Hello"}])
    text = tokenizer.decode(rewards(tokenizer).wrap(example, "Be kind."))
    assert text == "<user>Be kind.\n\nHello<assistant>"


def test_messages_of_other_tokens_are_refused(embedded_tokenizer):
    example = conversation(embedded_tokenizer, [{"role": "user", "content": "Hello"}])
    example.prompt = [{"role": "user", "content": "Goodbye"}]
    with pytest.raises(BadInputError, match="the tokens that the policy reads"):
        rewards(embedded_tokenizer).wrap(example, "Be kind.")
