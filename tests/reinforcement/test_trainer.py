"""The trainer of recipes against stock GRPO, and what every kind of piece is given."""

from __future__ import annotations

import json

import pytest
import torch

trl = pytest.importorskip("trl")

from transformers import AutoModelForCausalLM

from everytoken.core.errors import BadInputError
from everytoken.reinforcement.base import KINDS, Recipe
from everytoken.reinforcement.rollouts import RewardError
from everytoken.training.finite_check import NonFiniteLossError

from ..tiers import commit_tier
from .common import PROMPTS, config, distance, made, policy, score, stock, weights


class Same:
    """A piece that changes nothing, of any kind that is called once a batch or update."""

    def __init__(self, kind, needs=()):
        self.kind, self.needs, self.calls = kind, frozenset(needs), 0

    def __call__(self, batch, advantages=None, high=None):
        self.calls += 1
        if self.kind == "clip":
            return advantages, high
        if self.kind == "ratio_weight":
            return torch.ones_like(batch.ratio)
        if self.kind == "rollouts":
            return torch.ones(len(batch.mask), dtype=torch.bool)
        if self.kind == "tokens":
            return torch.ones_like(batch.mask)
        if self.kind == "token_weight":
            assert "distributions" not in self.needs or batch.distributions(torch.tensor([0]))[1].dim() == 3
            return torch.ones_like(advantages)
        return advantages


def neutral():
    kinds = ("token_advantage", "token_weight", "rollouts", "tokens", "clip", "ratio_weight")
    pieces = [Same(kind, needs=("entropies", "logps")) for kind in kinds]
    return [*pieces, Same("token_weight", needs=("distributions",))]


def same_weights(tmp_path, **changes):
    if changes.get("beta"):  # TRL loads the reference by its name
        policy().save_pretrained(tmp_path / "model")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "model") if changes.get("beta") else None for _ in "ab"]
    ours = made(tmp_path / "ours", *neutral(), model=models[0], **changes)
    theirs = stock(tmp_path / "theirs", model=models[1], **changes)
    start = weights(theirs)
    for trainer in (ours, theirs):
        torch.manual_seed(3)  # of sampling
        trainer.train()
    assert all(piece.calls for piece in ours.recipe.pieces)
    assert distance(weights(theirs), start) > 1e-3
    assert distance(weights(ours), weights(theirs)) == 0.0
    return ours


@pytest.mark.parametrize("loss_type", commit_tier(["dapo", "grpo", "bnpo", "dr_grpo"], ["dapo", "bnpo"]))
def test_pieces_that_change_nothing_train_the_weights_of_stock_grpo(tmp_path, loss_type):
    same_weights(tmp_path, loss_type=loss_type)


@pytest.mark.parametrize(
    "changes",
    [
        dict(gradient_accumulation_steps=2, num_iterations=1),
        dict(gradient_accumulation_steps=4, steps_per_generation=2, num_iterations=1),
        dict(bf16=True),
        dict(beta=0.1),
        dict(scale_rewards="batch", temperature=0.7),
    ],
    ids=str,
)
@pytest.mark.slow
def test_under_other_settings_too(tmp_path, changes):
    same_weights(tmp_path, **changes)


@pytest.mark.slow
def test_under_lora_too(tmp_path):
    peft = pytest.importorskip("peft")
    found = []
    for make in (lambda **more: made(tmp_path / "a", *neutral(), **more), lambda **more: stock(tmp_path / "b", **more)):
        torch.manual_seed(5)
        trainer = make(peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        torch.manual_seed(3)
        trainer.train()
        found.append(weights(trainer))
    assert distance(*found) == 0.0


class Counter:
    """A stateful weight: its value depends on how many batches it has seen."""

    kind = "token_weight"

    def __init__(self):
        self.seen = 0

    def __call__(self, batch, advantages):
        self.seen += 1
        return torch.full_like(advantages, 1.0 + self.seen)

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


@pytest.mark.slow
def test_resumed_in_the_middle_it_ends_at_the_same_weights(tmp_path):
    """The fourth step makes new rollouts, which the resumed run makes as well; a piece's state comes along."""
    changes = dict(max_steps=4, num_iterations=1, steps_per_generation=1)
    whole = made(tmp_path / "whole", Counter(), save_strategy="steps", save_steps=2, **changes)
    whole.train()
    again = made(tmp_path / "again", Counter(), **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.recipe.pieces[0].seen == whole.recipe.pieces[0].seen == 4
    assert distance(weights(whole), weights(again)) == 0.0
    other = made(tmp_path / "other", Counter(), Same("tokens"), **changes)
    with pytest.raises(BadInputError, match="of the recipe Counter, and this one is Counter, Same"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


@pytest.mark.parametrize(("updates", "passes"), [(2, 1), (1, 1)])
def test_scores_that_trl_makes_of_rollouts_are_used(tmp_path, updates, passes):
    """The policy reads a batch of rollouts once for log-probabilities and entropies, whether TRL needs them or not."""
    seen, calls = [], []

    class Watched(Same):
        def __call__(self, batch, advantages=None, high=None):
            seen.append((batch.logps, batch.entropies))
            return advantages

    trainer = made(tmp_path, Watched("token_advantage", needs=("entropies",)), num_iterations=updates,
                   steps_per_generation=1)  # fmt: skip
    trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs.get("use_cache")), with_kwargs=True
    )
    generate, whole = trainer.model.generate, []

    def counted(*args, **kwargs):
        found = generate(*args, **kwargs)
        whole.append(len(calls))
        return found

    trainer.model.generate = counted
    batch = rollout(trainer)
    assert len(calls) - whole[0] == passes
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention, length = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1), batch["completion_ids"].shape[1]
    logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].detach()
    mask = batch["completion_mask"].bool()
    ((logps, entropies),) = seen
    whole_logps = logits.log_softmax(-1)
    assert torch.allclose(entropies[mask], torch.distributions.Categorical(logits=logits).entropy()[mask], atol=1e-4)
    own = whole_logps.gather(-1, batch["completion_ids"][..., None])[..., 0]
    assert torch.allclose(logps[mask], own[mask], atol=1e-4)
    assert ("old_per_token_logps" in batch) == (updates == 2)


@pytest.mark.slow
def test_pieces_that_change_nothing_resume_as_stock_grpo_does(tmp_path):
    """Both go on from a checkpoint in the middle of a batch's updates and make new rollouts after it."""
    changes, found = dict(max_steps=4, num_iterations=2, steps_per_generation=1), []
    for make, folder, pieces in ((made, tmp_path / "ours", neutral()), (stock, tmp_path / "theirs", ())):
        torch.manual_seed(3)
        make(folder, *pieces, save_strategy="steps", save_steps=1, **changes).train()
        again = make(folder / "again", *(neutral() if pieces else ()), **changes)
        start = weights(again)
        again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
        assert again.state.global_step == 4 and distance(weights(again), start) > 1e-3
        found.append(weights(again))
    assert distance(*found) == 0.0


def rollout(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # Trainer sets it when training begins
    torch.manual_seed(0)
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


class Keep:
    """Keeps the first tokens of some rollouts."""

    def __init__(self, kind, divisor="kept", rows=(0, 3)):
        self.kind, self.divisor, self.rows = kind, divisor, list(rows)

    def __call__(self, batch, advantages, kept=None):
        chosen = torch.zeros(len(batch.mask), dtype=torch.bool)
        chosen[self.rows] = True
        return chosen if kept is None else batch.positions < 2


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
@pytest.mark.parametrize("divisor", ["kept", "all"])
def test_selections_divide_by_what_they_say(tmp_path, loss_type, divisor):
    """The loss by hand, from TRL's advantages and full logits: the ratio is 1 in the first update."""
    pieces = [Keep("rollouts", divisor), Keep("tokens", divisor)]
    changes = dict(loss_type=loss_type, steps_per_generation=1)
    ours, theirs = made(tmp_path, *pieces, **changes), stock(tmp_path, **changes)
    batch, plain = rollout(ours), rollout(theirs)
    mask = plain["completion_mask"].bool()
    kept = mask.clone()
    kept[[1, 2]], kept[:, 2:] = False, False
    loss = -(plain["advantages"][:, None] * kept)
    counted = kept if divisor == "kept" else mask
    if loss_type == "grpo":
        expected = (loss.sum(1) / counted.sum(1).clamp(min=1)).mean()
    else:
        expected = loss.sum() / counted.sum()
    assert ours._compute_loss(ours.model, batch).item() == pytest.approx(expected.item(), abs=1e-5)
    share = ours._metrics["train"]["recipe/tokens_trained"][-1]
    assert share == pytest.approx((kept.sum() / mask.sum()).item())


@pytest.mark.parametrize("loss_type", ["dapo", "bnpo", "grpo"])
def test_rollouts_that_are_left_out_need_no_forward(tmp_path, loss_type):
    """Where such rows do not count, the forward sees the others only, and the gradient is the same."""
    trainer = made(tmp_path, Keep("rollouts"), loss_type=loss_type, steps_per_generation=1)
    batch = rollout(trainer)
    sizes, gradients = [], []
    handle = trainer.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for drop in (True, False):
        trainer.model.zero_grad()
        if not drop:
            trainer._without_empty_rows = lambda inputs: inputs
        trainer._compute_loss(trainer.model, batch).backward()
        gradients.append(trainer.model.lm_head.weight.grad.clone())
    handle.remove()
    assert sizes == [4 if loss_type == "grpo" else 2, 4]
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients, atol=1e-7)


class Nothing:
    kind = "rollouts"

    def __call__(self, batch, advantages):
        return torch.zeros(len(batch.mask), dtype=torch.bool)


def test_nothing_selected_trains_nothing(tmp_path):
    trainer = made(tmp_path, Nothing())
    start = weights(trainer)
    trainer.train()
    assert distance(weights(trainer), start) == 0.0


def test_ratio_weights_and_bounds_are_those_of_the_update(tmp_path):
    """A weight that depends on the ratio, and bounds of every token, against the loss by hand after a step."""

    class Moved:
        kind = "ratio_weight"

        def __call__(self, update, low, high):
            assert torch.equal(high, 2 * low)
            return torch.where((update.ratio - 1).abs() > 0.01, 2.0, 0.5)

    class Wide:
        kind = "clip"

        def __call__(self, update, low, high):
            bounds = 0.02 + 0.01 * update.entropies
            return bounds, 2 * bounds

    trainer = made(tmp_path, Moved(), Wide(), loss_type="bnpo", steps_per_generation=1)
    batch = rollout(trainer)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length, mask = batch["completion_ids"].shape[1], batch["completion_mask"].bool()
    logps = torch.log_softmax(trainer.model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1], -1)
    entropies = -(logps.exp() * logps).sum(-1).detach()
    ratio = torch.exp(logps.gather(-1, batch["completion_ids"][..., None])[..., 0] - batch["old_per_token_logps"])
    weight = torch.where((ratio.detach() - 1).abs() > 0.01, 2.0, 0.5)
    advantages, low = batch["advantages"][:, None] * weight, 0.02 + 0.01 * entropies
    clipped = torch.clamp(ratio, 1 - low, 1 + 2 * low)
    assert ((ratio != clipped) & mask).any() and len(weight[mask].unique()) == 2
    expected = -(torch.min(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()
    assert trainer._compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), abs=1e-5)
    assert (trainer.epsilon_low, trainer.epsilon_high) == (0.2, 0.2)


@pytest.mark.slow
def test_prompts_rewards_samplers_and_auxiliary_losses(tmp_path):
    """The other kinds, each seen to act."""

    class Longer:
        kind = "prompt"

        def __call__(self, row, step, steps):
            return row | {"prompt": row["prompt"] + "jj"}

    class Short:
        kind, weight, __name__ = "reward", 0.5, "short"

        def __call__(self, prompts, completion_ids, trainer_state, **_):
            assert all(prompt.endswith("jj") for prompt in prompts)
            return [-float(len(ids)) - trainer_state.global_step for ids in completion_ids]

    class Backwards:
        kind = "sampler"

        def __call__(self, dataset, repeats, batches):
            rows = range(len(dataset) - 1, -1, -1)
            size = repeats["batch_size"]
            blocks = [rows[first : first + size] for first in range(0, len(rows), size)]
            return [row for block in blocks for _ in range(repeats["repeat_count"]) for row in block for _ in range(4)]

    class Decay:
        kind = "auxiliary"

        def __call__(self, model, inputs, step, steps):
            return 100.0 * model.lm_head.weight.square().mean()

    pieces = (Longer(), Short(), Backwards(), Decay())
    trainer, plain = made(tmp_path, *pieces), made(tmp_path, Longer(), Short(), Backwards())
    assert trainer.reward_weights.tolist() == [1.0, 0.5]
    start = trainer.model.lm_head.weight.square().mean().item()
    for each in (trainer, plain):
        each.train()
    assert trainer.model.lm_head.weight.square().mean().item() < min(
        start, plain.model.lm_head.weight.square().mean().item()
    )
    assert list(trainer._logs["prompt"])[:4] == ["kjj"] * 4
    assert PROMPTS[-1] == {"prompt": "k"}


def test_recipes_that_cannot_be():
    with pytest.raises(BadInputError, match="Same and Same would both set the clip"):
        Recipe(Same("clip"), Same("tokens"), Same("clip"))
    with pytest.raises(BadInputError, match="kind of piece"):
        Recipe(Same("token_weights"))
    with pytest.raises(BadInputError, match="is no piece"):
        Recipe(lambda batch: None)
    with pytest.raises(BadInputError, match="need of Same"):
        Recipe(Same("tokens", needs=("logits",)))
    with pytest.raises(BadInputError, match="all and kept"):
        Recipe(Keep("rollouts"), Keep("tokens", "all"))
    assert Recipe().divisor == "kept" and set(KINDS) >= {"sampler", "aggregation"}


@pytest.mark.parametrize(
    ("pieces", "changes", "names"),
    [
        ([Same("token_weight")], dict(off_policy_mask_threshold=0.1), "off_policy_mask_threshold"),
        ([Same("token_weight")], dict(loss_type="vespo"), "loss_type"),
        ([Same("clip")], dict(loss_type="cispo"), "loss_type"),
        ([Same("tokens")], dict(importance_sampling_level="sequence"), "importance_sampling_level"),
        ([Same("tokens")], dict(top_entropy_quantile=0.5), "top_entropy_quantile"),
        ([Same("temperature")], dict(use_transformers_continuous_batching=True), "continuous_batching"),
        ([Same("temperature")], dict(use_vllm=True), "use_vllm"),
        ([Keep("tokens", "all")], dict(beta=0.1), "beta"),
        ([Same("token_weight", ["distributions"])], dict(per_device_train_batch_size=2, steps_per_generation=1,
          gradient_accumulation_steps=2, generation_batch_size=None), "num_generations"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_settings_that_a_recipe_cannot_honour(tmp_path, pieces, changes, names):
    if names == "num_generations":  # two processes of two rows each would split a group
        args = config(tmp_path, num_generations=2, **{k: v for k, v in changes.items() if v is not None})
        args.num_generations = 4
        from everytoken.reinforcement.recipe_checks import check_recipe

        with pytest.raises(BadInputError, match=names):
            check_recipe(Recipe(*pieces), args, None)
        return
    with pytest.raises(BadInputError, match=names):
        made(tmp_path, *pieces, **changes)


def test_other_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="Nothing rewards"):
        made(tmp_path, reward=None)
    with pytest.raises(BadInputError, match="loaded model"):
        made(tmp_path, model="a-name")
    with pytest.raises(BadInputError, match="tools of a data column"):
        made(tmp_path, prompts=[row | {"tools": []} for row in PROMPTS])

    class Negative:
        kind = "token_weight"

        def __call__(self, batch, advantages):
            return -torch.ones_like(advantages)

    with pytest.raises(BadInputError, match="Negative gave a negative weight"):
        made(tmp_path, Negative()).train()


@pytest.mark.slow
def test_a_reward_that_fails_leaves_its_batch_and_training_goes_on(tmp_path):
    changes = dict(max_steps=2, num_iterations=1, steps_per_generation=1, save_strategy="steps", save_steps=1)
    calls = []

    def brittle(completions, **_):
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError("no digits")
        return score(completions)

    with pytest.raises(RewardError, match="ZeroDivisionError: no digits"):
        made(tmp_path, Counter(), reward=brittle, **changes).train()
    assert len(json.loads((tmp_path / "bad_batch.json").read_text())["rows"]) == 4
    again = made(tmp_path, Counter(), reward=brittle, **changes)
    again.train(resume_from_checkpoint=True)
    assert (again.state.global_step, again.recipe.pieces[0].seen) == (2, 2)


def test_rewards_that_are_no_numbers(tmp_path):
    """None and NaN score nothing: their advantage is 0. An infinite reward stops training by its function's name."""
    trainer = made(
        tmp_path, Same("token_advantage"), reward=lambda completions, **_: [None, 1.0, float("nan"), 0.0] * 2
    )
    advantages = rollout(trainer)["advantages"]
    assert advantages[[0, 2]].abs().sum() == 0 and advantages[1, 0] > 0
    assert trainer.sequence_rewards().isnan().tolist() == [True, False, True, False] * 2

    def boundless(completions, **_):
        return [float("inf")] * len(completions)

    with pytest.raises(RewardError, match="boundless gave an infinite reward"):
        rollout(made(tmp_path, reward=boundless))
    trainer = made(tmp_path, Same("clip"), steps_per_generation=1)
    batch = rollout(trainer)
    batch["advantages"] = batch["advantages"] * float("nan")
    with pytest.raises(NonFiniteLossError):
        trainer._compute_loss(trainer.model, batch)


def test_rewards_that_are_not_one_number_a_completion(tmp_path):
    """Too few of them, or texts: the batch is saved, and the function is named."""
    for name, answer in (("few", [1.0]), ("texts", ["good"] * 8)):

        def reward(completions, answer=answer, **_):
            return answer

        reward.__name__ = name
        with pytest.raises(RewardError, match=r"A reward function failed .*bad_batch\.json"):
            rollout(made(tmp_path / name, reward=reward))
        assert len(json.loads((tmp_path / name / "bad_batch.json").read_text())["rows"]) == 8


def test_groups_that_do_not_fit_are_refused_before_a_model_is_read(tmp_path):
    for count in (1, 3):
        with pytest.raises(ValueError, match="generations"):
            config(tmp_path, num_generations=count)


def test_all_rewards_equal_train_nothing(tmp_path):
    trainer = made(tmp_path, *neutral(), reward=lambda completions, **_: [1.0] * len(completions))
    start = weights(trainer)
    trainer.train()
    assert distance(weights(trainer), start) == 0.0


def test_the_policy_may_answer_nothing(tmp_path):
    """Every completion is the end token alone."""
    only_the_end = {"suppress_tokens": list(range(1, 13))}
    trainer = made(tmp_path, *neutral(), Keep("rollouts"), generation_kwargs=only_the_end)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[0]["completions/max_length"] == 1
