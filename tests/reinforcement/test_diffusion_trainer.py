"""DiffusionGRPOTrainer: the losses of MDPO, GDPO and CJ-GRPO by TRL's own loss, micro-batches, refusals."""

from __future__ import annotations

import datasets
import pytest
import torch
import trl

from everytoken.architectures.any_order.configuration_any_order import AnyOrderConfig
from everytoken.architectures.any_order.modeling_any_order import AnyOrderLM
from everytoken.core.errors import BadInputError, UnsupportedModelError
from everytoken.decoding.canvas.denoising import DenoisingSampler
from everytoken.reinforcement.base import Recipe
from everytoken.reinforcement.canvas_pieces import (
    Bound,
    CanvasRollouts,
    CanvasRows,
    DiffuGRPO,
    OneStep,
    StepMean,
    Transitions,
)
from everytoken.reinforcement.cj_grpo import CJGRPO, cj_grpo_loss, step_mean_weights
from everytoken.reinforcement.diffusion_gdpo import DiffusionGDPO, diffusion_gdpo_loss, mean_advantages
from everytoken.reinforcement.diffusion_trainer import DiffusionGRPOTrainer
from everytoken.reinforcement.likelihoods import elbo, trajectory_logps
from everytoken.reinforcement.mdpo import MDPO, StepCredit, mdpo_step_loss, step_advantages, step_weights
from everytoken.reinforcement.trainer import RecipeTrainer
from everytoken.testing.models import tiny_llama
from everytoken.training.datasets.sudoku import OPEN, TOKENS, sudoku_tokenizer

from .common import distance, weights

PUZZLES = [{"prompt": text} for text in ("1.3....2", "4...1.2.", "..12....", "3..1.4..")]
"""Half a grid each; the numbers of open cells differ."""


def network(seed=1):
    torch.manual_seed(seed)
    shape = AnyOrderConfig(vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mask_token_id=OPEN)
    return AnyOrderLM(shape)


def ones(completions, **_):
    """Rewards that differ within a group, and between guesses."""
    return [text.count("1") + 0.1 * text.count("3") + 0.01 * text.startswith("2") for text in completions]


def config(folder, **changes):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=6, max_steps=2,
        learning_rate=1e-2, report_to=[], logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0, gradient_checkpointing=False,
    )  # fmt: skip
    return trl.GRPOConfig(**settings | changes)


def made(folder, method, *, model=None, prompts=PUZZLES, reward=ones, recipe=None, **changes):
    return DiffusionGRPOTrainer(
        model or network(), recipe=recipe or method.recipe(), reward_funcs=reward,
        args=config(folder, **({} if method is None else method.arguments()) | changes),
        train_dataset=datasets.Dataset.from_list(prompts), processing_class=sudoku_tokenizer(),
    )  # fmt: skip


def batch_of(trainer, count=2):
    """A batch of rollouts as training makes it."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    torch.manual_seed(3)
    rows = [dict(row) for row in PUZZLES[:count] for _ in range(trainer.num_generations)]
    return trainer._generate_and_score_completions(rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()]


def same_gradients(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_mdpo_by_trls_loss_is_the_papers_in_value_and_gradient(tmp_path):
    trainer = made(tmp_path, MDPO(denoising_steps=3, trained_steps=2), temperature=0.7)
    batch, model = batch_of(trainer), trainer.model
    found, rewards = trainer._found, trainer._rewards_of_steps()
    advantages = step_advantages(rewards, groups=torch.arange(8) // 4)
    assert batch["step"].unique().numel() == 2 and len(batch["advantages"]) == 16
    losses = []
    for step in batch["step"].unique().tolist():
        state = found.state(step)
        logits = model(input_ids=state, attention_mask=found.attention.long()).logits / 0.7
        logits[..., OPEN] = -torch.inf
        logps = logits.log_softmax(-1).gather(-1, found.guesses[:, step][..., None])[..., 0]
        weight = step_weights(found, step)
        logps = torch.where(weight > 0, logps, 0.0)
        losses.append(mdpo_step_loss(logps, logps.detach(), weight, advantages[:, step]))
    paper = torch.stack(losses).mean()
    ours = trainer._compute_loss(model, batch)
    torch.testing.assert_close(ours, paper)
    assert ours.abs() > 1e-3
    same_gradients(gradients(model, ours), gradients(model, paper))


def test_cj_grpo_by_trls_loss_is_the_papers_in_value_and_gradient(tmp_path):
    trainer = made(tmp_path, CJGRPO())
    batch, model = batch_of(trainer), trainer.model
    found = trainer._found
    assert found.counts.sum(1).tolist() == [5] * 8
    logps = trajectory_logps(model, found).per_position
    paper = cj_grpo_loss(
        logps,
        logps.detach(),
        mean_advantages(trainer.sequence_rewards(), torch.arange(8) // 4),
        step_mean_weights(found),
    )
    ours = trainer._compute_loss(model, batch)
    torch.testing.assert_close(ours, paper)
    same_gradients(gradients(model, ours), gradients(model, paper))


def test_gdpo_by_trls_loss_is_the_papers_in_value_and_gradient(tmp_path):
    """With the policy moved away from the one that wrote, so that the ratio is not 1."""
    trainer = made(tmp_path, DiffusionGDPO(), num_iterations=2, steps_per_generation=1)
    batch, model = batch_of(trainer), trainer.model
    found, advantages = trainer._found, mean_advantages(trainer.sequence_rewards(), torch.arange(8) // 4)

    def bound(iteration):
        seeds = batch["canvas_seeds"][:, iteration]
        return elbo(model, found.final_ids, found.editable, found.attention, seeds=seeds)

    with torch.no_grad():
        old = [bound(iteration) for iteration in range(2)]
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    for iteration in range(2):
        trainer._step = iteration
        paper = diffusion_gdpo_loss(bound(iteration), old[iteration], advantages, found.editable.sum(1))
        ours = trainer._compute_loss(model, batch)
        torch.testing.assert_close(ours, paper)
        assert ours.abs() > 1e-5
        same_gradients(gradients(model, ours), gradients(model, paper))


METHODS = {
    "diffu-GRPO": DiffuGRPO(prompt_mask_prob=0.3),
    "MDPO": MDPO(denoising_steps=3, trained_steps=2),
    "GDPO": DiffusionGDPO(mask_count="bernoulli", mask_weight="1/t"),
    "CJ-GRPO": CJGRPO(),
}


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_change_nothing(tmp_path, name):
    """The same rollouts in halves give the same gradient, and so does scoring in parts."""
    trainer = made(tmp_path, METHODS[name], num_iterations=2, steps_per_generation=1)
    batch, model = batch_of(trainer), trainer.model
    whole = gradients(model, trainer._compute_loss(model, dict(batch)))
    rows = len(batch["advantages"])
    mixed = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    halves = []
    for part in (mixed[: rows // 2], mixed[rows // 2 :]):
        own = {k: v[part] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in batch.items()}
        halves.append(trainer._compute_loss(model, own) / 2)
    same_gradients(whole, gradients(model, sum(halves)))
    old = batch["canvas_old"]
    trainer.args.per_device_train_batch_size = 3
    again = dict(batch) | {"old_per_token_logps": old[:, 0]}
    trainer._score_first(again)
    torch.testing.assert_close(again["canvas_old"], old)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_every_method_trains(tmp_path, name):
    trainer = made(tmp_path, METHODS[name], num_iterations=2, steps_per_generation=1, max_steps=3)
    before = weights(trainer)
    trainer.train()
    assert distance(before, weights(trainer)) > 1e-4
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert all(entry["entropy"] == entry["entropy"] for entry in logs)


def test_behind_a_prompt_texts_end_at_the_end_token(tmp_path):
    """Rewards see the text up to its end token; the loss sees the canvas, or the text alone."""
    seen = []

    def reward(completions, completion_ids, **_):
        seen.extend(completion_ids)
        return ones(completions)

    prompts = [{"prompt": text} for text in ("12", "341", "2")]
    for after in (True, False):
        trainer = made(tmp_path, CJGRPO(ascending=False, score_after_end=after), prompts=prompts, reward=reward)
        trainer.eos_token_ids = [2, 5]
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        seen.clear()
        batch = trainer._generate_and_score_completions([dict(row) for row in prompts[:2] for _ in range(4)])
        canvas = batch["completion_ids"]
        assert canvas.shape == (8, 6) and bool(batch["completion_mask"].all())
        assert any(len(ids) < 6 for ids in seen)
        for row, ids in enumerate(seen):
            assert canvas[row, : len(ids)].tolist() == ids and not {2, 5} & set(ids[:-1])
            assert int(batch["tool_mask"][row].sum()) == (6 if after else len(ids))
        assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


@pytest.mark.parametrize("schedule", ["even", "log"])
def test_rows_that_are_full_at_a_step_have_no_advantage_there(tmp_path, schedule):
    """Grids with five and with eleven open cells: the steps of the second end when the first are long full."""
    prompts = [{"prompt": "1.3....2"}, {"prompt": "1..............2"}]
    trainer = made(tmp_path, MDPO(trained_steps=20, schedule=schedule), prompts=prompts)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    batch = trainer._generate_and_score_completions([dict(row) for row in prompts for _ in range(4)])
    found = trainer._found
    late = [row for row, step in enumerate(batch["step"].tolist()) if step >= 6 and row % 8 < 4]
    assert late and not batch["advantages"][late].any() and batch["tool_mask"][late].any(1).all()
    assert batch["advantages"].any() and found.steps > 6
    assert torch.isfinite(trainer._compute_loss(trainer.model, batch))


def test_dropout_is_off_and_the_callers_settings_stay(tmp_path):
    model = network()
    model.drop = torch.nn.Dropout(0.5)
    args = config(tmp_path, **MDPO().arguments())
    trainer = DiffusionGRPOTrainer(
        model, recipe=MDPO().recipe(), reward_funcs=ones, args=args, processing_class=sudoku_tokenizer(),
        train_dataset=datasets.Dataset.from_list(PUZZLES),
    )  # fmt: skip
    assert trainer.model.drop.p == 0 and not args.disable_dropout


def test_what_stands_behind_the_end_is_not_in_sight_of_what_is_scored(tmp_path):
    with pytest.raises(BadInputError, match="score_after_end"):
        made(tmp_path, CJGRPO(ascending=False, consistent=False, score_after_end=False))


def test_one_step_that_is_trained_is_grpo_of_the_last_guess(tmp_path):
    """S = 1: the step's advantage is GRPO's, and the prediction is of the whole canvas at once."""
    method = MDPO(denoising_steps=1, confidence_weight=False)
    trainer = made(tmp_path, method)
    batch = batch_of(trainer)
    rewards = trainer.sequence_rewards().view(2, 4)
    grpo = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    got = (batch["advantages"] * batch["tool_mask"]).sum(1) / batch["tool_mask"].sum(1)
    torch.testing.assert_close(got, grpo, rtol=2e-3, atol=2e-3)  # the deviation is that of twice the reward


def test_rewards_of_guesses(tmp_path):
    """Each guess has the reward of its own text, and the last one that of the rollout."""
    trainer = made(tmp_path, MDPO(denoising_steps=3))
    batch_of(trainer)
    found, tokenizer = trainer._found, trainer.processing_class
    rewards = trainer._rewards_of_steps()
    for step in range(3):
        texts = tokenizer.batch_decode(found.guesses[:, step], skip_special_tokens=True)
        assert rewards[:, step].tolist() == pytest.approx(ones(texts))
    assert torch.equal(rewards[:, 2], trainer.sequence_rewards())


def test_weights_of_steps_do_without_a_trainer_of_canvases():
    from .common import batch_of as plain

    with pytest.raises(BadInputError, match="DiffusionGRPOTrainer"):
        StepMean()(plain([1.0, 0.0]), torch.zeros(2, 3))


class Nothing:
    kind = "token_weight"
    needs = frozenset({"ids"})


class Plain:
    kind = "token_weight"


class Taking:
    def __call__(self, state):
        return torch.zeros_like(state.in_block)


@pytest.mark.parametrize(
    ("pieces", "changes", "message"),
    [
        ((CanvasRollouts(),), {}, "one that gives its likelihood"),
        ((CanvasRollouts(), OneStep(), Nothing()), {}, "left to right"),
        ((CanvasRollouts(), OneStep(), StepCredit(), Plain()), {}, "Plain would change it"),
        ((CanvasRollouts(), Bound(), StepCredit()), {}, "whole"),
        ((CanvasRollouts(remask=Taking()), Transitions()), {}, "Taking takes tokens back"),
        ((CanvasRollouts(), Bound()), {}, "importance_sampling_level"),
        ((CanvasRollouts(), Transitions(), StepMean()), {"loss_type": "dapo"}, "loss_type='grpo'"),
        ((CanvasRollouts(), OneStep()), {"top_k": 5}, "top_k"),
        ((CanvasRollouts(), OneStep()), {"temperature": 0.0}, "temperature above 0"),
        ((CanvasRollouts(), OneStep()), {"mask_truncated_completions": True}, "mask_truncated"),
        ((CanvasRollouts(), OneStep()), {"entropy_coef": 0.1}, "entropy_coef"),
    ],
)
def test_what_does_not_compose_is_refused(tmp_path, pieces, changes, message):
    with pytest.raises(BadInputError, match=message):
        made(tmp_path, None, recipe=Recipe(*pieces), **{"loss_type": "grpo", "beta": 0.0} | changes)


def test_models_that_cannot_write_a_canvas_are_refused(tmp_path):
    recipe = DiffuGRPO().recipe()
    causal = tiny_llama(len(TOKENS), seed=1, eos=0)
    with pytest.raises(BadInputError, match="names no mask token"):
        made(tmp_path, DiffuGRPO(), model=causal)
    causal.config.mask_token_id = OPEN
    with pytest.raises(UnsupportedModelError, match="is causal"):
        made(tmp_path, DiffuGRPO(), model=causal)
    with pytest.raises(BadInputError, match="Train them with DiffusionGRPOTrainer"):
        RecipeTrainer(network(), recipe=recipe, reward_funcs=ones, args=config(tmp_path))
    with pytest.raises(BadInputError, match="loaded model"):
        DiffusionGRPOTrainer("a name", recipe=recipe)


def test_prompts_of_two_kinds_and_records_of_other_texts_are_refused(tmp_path):
    trainer = made(tmp_path, DiffuGRPO())
    with pytest.raises(BadInputError, match="Some prompts have open positions"):
        trainer._generate_single_turn([[2, 3, OPEN], [2, 3]], None, {}, 2)
    found = DenoisingSampler(gen_length=4)(network(), torch.tensor([[2, 3]]))
    parts = (found.final_ids, found.attention, found.editable, found.editable, found.fix_step)
    with pytest.raises(BadInputError, match="record of other texts"):
        CanvasRows(*parts[:-1], found.fix_step[:, :-1], torch.zeros(1), 4, OPEN)
    with pytest.raises(BadInputError, match="seeds are one a row"):
        CanvasRows(*parts, torch.zeros(2), 4, OPEN)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MDPO(trained_steps=0), "At least one step"),
        (lambda: MDPO(advantage="last"), "advantages"),
        (lambda: DiffusionGDPO(rule="gauss-9"), "gauss-9"),
        (lambda: DiffusionGDPO(mask_count="bernoulli"), "weigh 1/t"),
        (lambda: DiffusionGDPO(masks=0), "masks is 1"),
        (lambda: CJGRPO(denoising_steps=4), "ascending chooses"),
        (lambda: DiffuGRPO(prompt_mask_prob=1.0), "prompt_mask_prob"),
        (lambda: DiffuGRPO(remasking="luck"), "luck"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(BadInputError, match=message):
        make()


def test_eoser_needs_an_end_token(tmp_path):
    with pytest.raises(BadInputError, match="no end token"):
        batch_of(made(tmp_path, CJGRPO(eoser=True)))
