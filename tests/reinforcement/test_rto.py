"""RTO's rewards by brute force and limits; its trainer against GRPO's own and against PPO by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from everytoken.core.errors import BadInputError, TokenizerMismatchError
from everytoken.reinforcement.advantages import gae, whiten
from everytoken.reinforcement.critic import Critic, value_loss
from everytoken.reinforcement.rto import RTOConfig, RTOTrainer, token_rewards
from everytoken.training.finite_check import NonFiniteLossError

from ..conftest import tiny_llama
from ..tiers import commit_tier
from ..trainer_settings import trainer_settings

SEEDS = st.integers(0, 300)


def problem(seed, batch=4, length=7):
    generator = torch.Generator().manual_seed(seed)
    old, ref, dpo = (-torch.rand(batch, length, generator=generator) for _ in range(3))
    reward = 20 * torch.randn(batch, generator=generator)
    lengths = torch.randint(0, length + 1, (batch,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    return old, ref, dpo, reward, mask


@given(seed=SEEDS, clip=st.sampled_from([None, 0.0, 0.05, 1.0]))
@settings(max_examples=60, deadline=None)
def test_rewards_by_brute_force(seed, clip):
    old, ref, dpo, reward, mask = problem(seed)
    found = token_rewards(old, ref, dpo, reward, mask, dpo_reward_scale=0.3, dpo_reward_clip=clip, kl_coef=0.1)
    for row in range(len(mask)):
        last = max((t for t in range(mask.shape[1]) if mask[row, t]), default=None)
        for t in range(mask.shape[1]):
            if not mask[row, t]:
                assert found[row, t] == 0
                continue
            shaped = 0.3 * (dpo[row, t] - ref[row, t]).item()
            if clip is not None:
                shaped = max(-clip, min(clip, shaped))
            expected = shaped - 0.1 * (old[row, t] - ref[row, t]).item()
            expected += max(-10.0, min(10.0, reward[row].item())) if t == last else 0.0
            assert found[row, t].item() == pytest.approx(expected, abs=1e-5)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_unclipped_dpo_rewards_sum_to_the_implicit_reward_and_the_clamp_is_symmetric(seed):
    old, ref, dpo, reward, mask = problem(seed)
    nothing = torch.zeros_like(reward)
    whole = token_rewards(old, ref, dpo, nothing, mask, dpo_reward_scale=0.1, dpo_reward_clip=None, kl_coef=0.0)
    assert torch.allclose(whole.sum(-1), 0.1 * ((dpo - ref) * mask).sum(-1), atol=1e-6)
    one, other = (
        token_rewards(old, a, b, nothing, mask, dpo_reward_scale=1.0, dpo_reward_clip=0.2, kl_coef=0.0)
        for a, b in ((ref, dpo), (dpo, ref))
    )
    assert torch.equal(one, -other)
    assert one.abs().max() <= 0.2
    # beta_1 = 0 is PPO's reward
    ppo = token_rewards(old, ref, None, reward, mask)
    assert torch.equal(token_rewards(old, ref, dpo, reward, mask, dpo_reward_scale=0.0), ppo)


def test_value_loss_takes_the_larger_error():
    values, old, returns = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    mask = torch.tensor([[True, True]])
    # near: 0.2 and 0; errors max((1-2)^2, (0.2-2)^2) and 1
    assert value_loss(values, old, returns, mask, 0.2).item() == pytest.approx(0.5 * (3.24 + 1) / 2)
    assert value_loss(values, old, returns, mask, None).item() == pytest.approx(0.5 * (1 + 1) / 2)


def test_value_loss_counts_every_response_alike_or_every_token():
    values = torch.zeros(2, 3)
    returns = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert value_loss(values, values, returns, mask, None).item() == pytest.approx(0.5 * (1 + 4) / 2)
    assert value_loss(values, values, returns, mask, None, by_row=False).item() == pytest.approx(0.5 * (3 + 4) / 4)


# -- the trainer
# ---------------------------------------------------------------------------------------------------------
PROMPTS = [{"prompt": text} for text in ("The film was", "Our hotel", "My day", "In short,")]


def score(completions, **_):
    return [float(len(text)) / 10 for text in completions]


def config(folder, cls=RTOConfig, **changes):
    own = dict(
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        learning_rate=1e-3,
        num_iterations=2,
    )
    return cls(**trainer_settings(folder, **own | changes))


def policy():
    model = tiny_llama(49152, seed=1, eos=2)
    model.generation_config.pad_token_id = 2
    return model


def make(folder, tokenizer, dpo=None, reward=score, **changes):
    return RTOTrainer(
        policy(), reward_funcs=reward, dpo_model=dpo, args=config(folder, **changes),
        train_dataset=datasets.Dataset.from_list(PROMPTS), processing_class=copy.deepcopy(tokenizer),
    )  # fmt: skip


def rollout(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it when training begins
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize(
    ("loss_type", "scale"), commit_tier([("grpo", "group"), ("bnpo", "batch"), ("bnpo", "none")], [("bnpo", "batch")])
)
def test_without_token_rewards_the_group_form_is_grpo(tmp_path, embedded_tokenizer, loss_type, scale):
    grpo = dict(loss_type=loss_type, scale_rewards=scale)
    ours = make(tmp_path, embedded_tokenizer, estimator="group", dpo_reward_scale=0.0, init_kl_coef=0.0, **grpo)
    theirs = trl.GRPOTrainer(
        policy(), reward_funcs=score, args=config(tmp_path, trl.GRPOConfig, beta=0.0, **grpo),
        train_dataset=datasets.Dataset.from_list(PROMPTS), processing_class=copy.deepcopy(embedded_tokenizer),
    )  # fmt: skip
    one, other = rollout(ours), rollout(theirs)
    assert torch.equal(one["completion_ids"], other["completion_ids"])
    mask = one["completion_mask"].bool()
    assert torch.allclose(one["advantages"], other["advantages"][:, None] * mask, atol=1e-5)
    grads = []
    for trainer, batch in ((ours, one), (theirs, other)):
        loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()
        grads.append(torch.cat([weight.grad.flatten() for weight in trainer.model.parameters()]))
    assert torch.allclose(grads[0], grads[1], atol=1e-6)


def test_the_critics_form_is_ppo_by_hand(tmp_path, embedded_tokenizer):
    """Advantages, the clipped surrogate and its gradient, from full logits."""
    dpo, start = tiny_llama(49152, seed=4, eos=2), policy()
    trainer = make(
        tmp_path, embedded_tokenizer, dpo, dpo_reward_scale=0.5, dpo_reward_clip=1.0, init_kl_coef=0.2, critic_epochs=0
    )
    with torch.no_grad():  # a critic that says something, a policy that has moved from its reference
        trainer.critic.head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
        for weight in trainer.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    batch = rollout(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    mask, length = batch["completion_mask"].bool(), batch["completion_ids"].shape[1]

    def logps(model):
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
        return torch.log_softmax(logits, -1).gather(-1, batch["completion_ids"][..., None])[..., 0]

    with torch.no_grad():
        old, ref, guide = (logps(model) for model in (trainer.model, start, dpo))
        values = trainer.critic(ids, attention, length)
    texts = embedded_tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
    rewards = token_rewards(
        old, ref, guide, torch.tensor(score(texts)), mask, dpo_reward_scale=0.5, dpo_reward_clip=1.0, kl_coef=0.2
    )
    advantages = whiten(gae(rewards, values, mask, 1.0, 0.95)[0], mask)
    assert torch.allclose(batch["advantages"], advantages, atol=1e-3)
    with torch.no_grad():  # one step on: the ratio is no longer 1
        for weight in trainer.model.parameters():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    loss = trainer._compute_loss(trainer.model, batch)
    (ours,) = torch.autograd.grad(loss, trainer.model.lm_head.weight)
    ratio = torch.exp(logps(trainer.model) - old)
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = -((surrogate * mask).sum(-1) / mask.sum(-1)).mean()  # every response counts alike
    (plain,) = torch.autograd.grad(expected, trainer.model.lm_head.weight)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.allclose(ours, plain, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "group"])
def test_training_logs_and_resumes(tmp_path, embedded_tokenizer, estimator):
    dpo = tiny_llama(49152, seed=4, eos=2)
    changes = dict(estimator=estimator, max_steps=4, critic_lr=1e-3, normalize_rewards=True)
    trainer = make(tmp_path, embedded_tokenizer, dpo, save_strategy="steps", save_steps=2, **changes)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rto/kl" in entry]
    assert logs
    assert {"rto/dpo_reward", "rto/token_reward"} <= set(logs[0])
    assert ("rto/value_error" in logs[0]) == (estimator == "gae")
    again = make(tmp_path / "again", embedded_tokenizer, dpo, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert again._moments[0] == trainer._moments[0] == 16
    if estimator == "gae":
        assert any(weight.abs().sum() > 0 for weight in (again.critic.head.weight,))


@pytest.mark.parametrize("changes", [dict(temperature=0.5), dict(bf16=True), dict(temperature=2.0, bf16=True)], ids=str)
def test_equal_models_have_no_divergence_and_no_rewards(tmp_path, embedded_tokenizer, changes):
    """Policy, reference and DPO model are scored at one temperature and in one precision."""
    trainer = make(tmp_path, embedded_tokenizer, policy(), **changes)
    rollout(trainer)
    metrics = trainer._metrics["train"]
    assert metrics["rto/kl"][-1] == pytest.approx(0, abs=1e-6)
    assert metrics["rto/dpo_reward"][-1] == pytest.approx(0, abs=1e-6)


def test_frozen_models_score_at_the_sampling_temperature(tmp_path, embedded_tokenizer):
    dpo = tiny_llama(49152, seed=4, eos=2)
    trainer = make(tmp_path, embedded_tokenizer, dpo, temperature=0.5, dpo_reward_clip=None)
    ids = torch.randint(3, 49152, (3, 7), generator=torch.Generator().manual_seed(0))
    found = trainer._frozen_logps(dpo, ids, torch.ones_like(ids), 4)
    logits = dpo(input_ids=ids).logits[:, -5:-1] / 0.5
    assert torch.allclose(found, torch.log_softmax(logits, -1).gather(-1, ids[:, -4:, None])[..., 0], atol=1e-4)
    before = vars(dpo).get("forward")
    trainer._frozen_logps(dpo, ids, torch.ones_like(ids), 4)
    assert vars(dpo).get("forward") == before  # another trainer may use it at another temperature


@pytest.mark.slow
def test_a_checkpoint_without_the_critic_is_not_gone_on_from(tmp_path, embedded_tokenizer):
    dpo = tiny_llama(49152, seed=4, eos=2)
    make(tmp_path, embedded_tokenizer, dpo, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-2" / "rto.pt").unlink()
    with pytest.raises(BadInputError, match=r"no rto\.pt"):
        make(tmp_path, embedded_tokenizer, dpo).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    again = make(tmp_path, embedded_tokenizer, dpo)
    with pytest.warns(UserWarning, match="Skipped .*checkpoint-2.*rto"):
        again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2


@pytest.mark.slow
def test_the_critic_learns_the_returns(tmp_path, embedded_tokenizer):
    trainer = make(
        tmp_path,
        embedded_tokenizer,
        reward=lambda completions, **_: [2.0] * len(completions),
        dpo_reward_scale=0.0,
        init_kl_coef=0.0,
        critic_lr=3e-3,
        critic_epochs=10,
        value_clip=None,
    )
    errors = []
    for _ in range(4):
        rollout(trainer)
        errors.append(trainer._metrics["train"]["rto/value_error"][-1])
    assert errors[-1] < 0.2 * errors[0]


def test_lora_uses_the_policy_without_its_adapter(tmp_path, embedded_tokenizer):
    peft = pytest.importorskip("peft")
    trainer = RTOTrainer(
        policy(), reward_funcs=score, args=config(tmp_path, dpo_reward_scale=0.0, estimator="group"),
        train_dataset=datasets.Dataset.from_list(PROMPTS), processing_class=copy.deepcopy(embedded_tokenizer),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    )  # fmt: skip
    assert trainer.rto_reference is None
    rollout(trainer)
    assert abs(trainer._metrics["train"]["rto/kl"][-1]) > 1e-4
    trainer.train()


@pytest.mark.parametrize("estimator", ["gae", "group"])
@pytest.mark.slow
def test_a_dpo_adapter_holds_the_reference_too(tmp_path, embedded_tokenizer, estimator):
    """The same batch from a PEFT DPO model alone, and from the same two models in full."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    adapter = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    dpo = peft.get_peft_model(policy(), adapter)
    merged = copy.deepcopy(dpo).merge_and_unload()
    changes = dict(estimator=estimator, dpo_reward_scale=0.5, dpo_reward_clip=None, init_kl_coef=0.2)
    shared = make(tmp_path / "shared", embedded_tokenizer, dpo, **changes)
    full = make(tmp_path / "full", embedded_tokenizer, merged, **changes)
    assert shared.rto_reference is None
    assert full.rto_reference is not None
    with torch.no_grad():  # the policy must have moved from the reference
        for trainer in (shared, full):
            for weight in trainer.model.parameters():
                weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    one, other = rollout(shared), rollout(full)
    assert torch.equal(one["completion_ids"], other["completion_ids"])
    assert torch.allclose(one["advantages"], other["advantages"], atol=1e-4)
    assert shared._metrics["train"]["rto/dpo_reward"][-1] != 0
    assert abs(shared._metrics["train"]["rto/kl"][-1]) > 1e-4
    shared.train()


def test_bad_input(tmp_path, embedded_tokenizer):
    with pytest.raises(BadInputError, match="dpo_model"):
        make(tmp_path, embedded_tokenizer)
    with pytest.raises(TokenizerMismatchError, match="DPO model"):
        make(tmp_path, embedded_tokenizer, tiny_llama(100))
    with pytest.warns(UserWarning, match="differ in num_hidden_layers"):
        make(tmp_path, embedded_tokenizer, tiny_llama(49152, layers=3, eos=2))
    with pytest.raises(BadInputError, match="twice"):
        config(tmp_path, beta=0.1)
    with pytest.raises(BadInputError, match="estimator"):
        config(tmp_path, estimator="td")
    with pytest.raises(BadInputError, match="RTOConfig"):
        RTOTrainer(policy(), reward_funcs=score, args=config(tmp_path, trl.GRPOConfig), train_dataset=None)
    rows = datasets.Dataset.from_list([row | {"tools": "[]"} for row in PROMPTS])
    with pytest.raises(BadInputError, match="without the tools of a data column"):
        RTOTrainer(policy(), reward_funcs=score, dpo_model=policy(), args=config(tmp_path), train_dataset=rows)


def test_a_loss_that_is_not_finite_stops_training_and_saves_the_batch(tmp_path, embedded_tokenizer):
    import json

    trainer = make(tmp_path, embedded_tokenizer, dpo_reward_scale=0.0, estimator="group")
    batch = rollout(trainer)
    batch["advantages"] = batch["advantages"] * float("nan")
    with pytest.raises(NonFiniteLossError, match=r"bad_batch\.json"):
        trainer._compute_loss(trainer.model, batch)
    saved = json.loads((tmp_path / "bad_batch.json").read_text())
    assert len(saved["rows"]) == 8
    assert any("The film was" in row["prompt"] for row in saved["rows"])


def test_a_fresh_critic_expects_nothing_and_shares_no_weights():
    model = tiny_llama(seed=1)
    critic = Critic(model)
    ids = torch.randint(1, 11, (2, 6))
    values = critic(ids, torch.ones_like(ids), 3)
    assert torch.equal(values, torch.zeros(2, 3))
    with torch.no_grad():
        critic.body.embed_tokens.weight.zero_()
    assert model.base_model.embed_tokens.weight.abs().sum() > 0
