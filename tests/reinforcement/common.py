"""Tiny policies and their arguments, shared by the tests of trainers."""

from __future__ import annotations

import copy

import datasets
import torch
import trl

from everytoken.reinforcement.base import Recipe, RolloutBatch
from everytoken.reinforcement.trainer import RecipeTrainer
from everytoken.testing.models import tiny_llama, tiny_tokenizer

PROMPTS = [{"prompt": text} for text in ("ab", "cde", "fgab", "k")]
TOKENIZER = tiny_tokenizer()


def score(completions, **_):
    """Rewards that differ within a group."""
    return [text.count("a") + 0.1 * text.count("b") for text in completions]


def varied(completions, **_):
    """Rewards that differ whatever the policy writes."""
    return [float(sum(map(ord, text)) % 7) for text in completions]


def config(folder, **changes):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, max_steps=3,
        learning_rate=1e-2, report_to=[], logging_steps=1, save_strategy="no", use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0, num_iterations=2, steps_per_generation=2, gradient_checkpointing=False,
    )  # fmt: skip
    return trl.GRPOConfig(**settings | changes)


def policy(seed=1):
    model = tiny_llama(13, seed=seed, eos=0)
    model.generation_config.pad_token_id = model.config.pad_token_id = 1
    return model


def made(folder, *pieces, model=None, reward=score, prompts=PROMPTS, peft_config=None, **changes):
    """A trainer of some pieces."""
    return RecipeTrainer(
        model or policy(), recipe=Recipe(*pieces), reward_funcs=reward, args=config(folder, **changes),
        train_dataset=datasets.Dataset.from_list(prompts), processing_class=copy.deepcopy(TOKENIZER),
        peft_config=peft_config,
    )  # fmt: skip


def stock(folder, model=None, peft_config=None, **changes):
    return trl.GRPOTrainer(
        model or policy(), reward_funcs=score, args=config(folder, **changes),
        train_dataset=datasets.Dataset.from_list(PROMPTS), processing_class=copy.deepcopy(TOKENIZER),
        peft_config=peft_config,
    )  # fmt: skip


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def distance(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def batch_of(rewards, lengths=None, length=None, ids=None, group=None, **more):
    """A batch by hand: completions are of equal length unless ``lengths`` says otherwise."""
    rewards = torch.as_tensor(rewards, dtype=torch.float32)
    count = len(rewards)
    lengths = torch.as_tensor(lengths if lengths is not None else [length or 3] * count)
    length = length or int(lengths.max())
    mask = torch.arange(length) < lengths[:, None]
    if ids is None:
        ids = torch.arange(count * length).view(count, length) + 2
    return RolloutBatch(ids, mask, torch.arange(count) // (group or count), rewards, **more)
