"""IFT's claims: with the same demonstrations, a policy does better on its own than after supervised tuning (Frozen
Lake, and text).

Frozen Lake is gymnasium's: a map of safe ice, holes and a goal; an episode succeeds if the agent reaches the goal. A
small transformer reads a random map and writes moves; demonstrations are shortest paths. Text: the embedded model
writes words in capitals.
"""

from __future__ import annotations

import random
import tempfile
from collections import deque
from typing import TYPE_CHECKING, Any

import torch

from ..core.quiet import quiet_training
from ..core.rng import derive_seed, seed_everything
from ..training.datasets.sentiment import continuations
from .base import Arms, Claim, Context, Reproduction
from .beds.small_models import character_tokenizer, small_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

    from ..preference.ift import IFTSettings

MOVES = "LDRU"  # gymnasium's actions 0 to 3
SIZE = 5
WHY = (
    "The paper tunes Mistral-7B on UltraChat and UltraFeedback, and shows Frozen Lake as an illustration; here a small "
    "transformer learns shortest paths on random maps, and the embedded 135M model to write words in capitals, both "
    "tuned for the same steps on the same rows."
)


def lake(rng: random.Random) -> list[str]:
    """A random solvable map of ``SIZE`` rows, by gymnasium's generator."""
    from gymnasium.envs.toy_text.frozen_lake import generate_random_map

    return generate_random_map(size=SIZE, p=0.7, seed=rng.randrange(2**31))


def shortest_path(field: list[str]) -> str:
    """Moves from S to G along safe cells; among equals, the first in the order of ``MOVES``."""
    steps = {"L": (0, -1), "D": (1, 0), "R": (0, 1), "U": (-1, 0)}
    waiting, paths = deque([(0, 0)]), {(0, 0): ""}
    while waiting:
        row, column = waiting.popleft()
        if field[row][column] == "G":
            return paths[row, column]
        for move, (down, right) in steps.items():
            place = row + down, column + right
            if place not in paths and all(0 <= x < SIZE for x in place) and field[place[0]][place[1]] != "H":
                paths[place] = paths[row, column] + move
                waiting.append(place)
    raise AssertionError("gymnasium's maps are solvable")


def succeeds(field: list[str], moves: str) -> bool:
    """Plays the moves in gymnasium's environment."""
    import gymnasium

    environment = gymnasium.make("FrozenLake-v1", desc=field, is_slippery=False, max_episode_steps=100)
    environment.reset(seed=0)
    try:
        for move in moves:
            if move not in MOVES:
                return False
            _, reward, ended, *_ = environment.step(MOVES.index(move))
            if ended:
                return bool(reward)
        return False
    finally:
        environment.close()


@quiet_training()
def tune(
    context: Context,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, str]],
    settings: IFTSettings,
    steps: int,
    batch: int,
    lr: float,
    name: str,
) -> PreTrainedModel:
    """SFT is IFT with residual 0 and gamma 0: one trainer, equal in value and gradient to TRL's (tests say so)."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig

    from ..preference.ift import IFTTrainer
    from ..training.quiet import quiet_arguments, without_printer

    seed_everything(context.seed)

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            if state.global_step % 10 == 0:
                context.report(name, state.global_step, steps)

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            **quiet_arguments(
                folder,
                per_device_train_batch_size=batch,
                max_steps=steps,
                learning_rate=lr,
                lr_scheduler_type="cosine",
                warmup_steps=max(1, steps // 10),
                seed=context.seed,
                data_seed=context.seed,
                completion_only_loss=True,
            )
        )
        trainer = IFTTrainer(
            model,
            ift=settings,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Watch()],
        )
        without_printer(trainer).train()
    return model.eval()


def run(context: Context) -> Arms:
    from ..preference.ift import IFTSettings

    arms: Arms = {"SFT": {}, "IFT": {}}
    settings = {"SFT": IFTSettings(residual=0.0, gamma=0.0), "IFT": IFTSettings()}
    rng = random.Random(derive_seed(context.seed, "lakes"))
    train, test, steps = (256, 48, 40) if context.quick else (3000, 400, 600)
    fields = [lake(rng) for _ in range(train + test)]
    seen = {"/".join(field) for field in fields[:train]}
    held = [field for field in fields[train:] if "/".join(field) not in seen]
    rows = [{"prompt": "/".join(field) + ">", "completion": shortest_path(field)} for field in fields[:train]]
    tokenizer = character_tokenizer("SFHG/>" + MOVES)
    for name, setting in settings.items():
        seed_everything(context.seed)
        model = small_model(len(tokenizer), end=tokenizer.eos_token_id, context=128)
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        tune(context, model, tokenizer, rows, setting, steps, 32, 1e-3, f"Frozen Lake, {name}")
        prompts = ["/".join(field) + ">" for field in held]
        for label, sample in (("Frozen Lake success, greedy", False), ("Frozen Lake success, sampled", True)):
            torch.manual_seed(context.seed)
            moves = continuations(model, tokenizer, prompts, 24, 128, sample)
            arms[name][label] = [float(succeeds(field, move)) for field, move in zip(held, moves, strict=True)]
    found = context.part("capitals", lambda: capitals(context, settings))
    return {name: arms[name] | found[name] for name in arms}


def capitals(context: Context, settings: dict[str, IFTSettings]) -> Arms:
    """Words of three to five letters in capitals, by the embedded model; exact match of its own greedy answers on words
    never seen.
    """
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    from ..core.loading import load_model, load_tokenizer

    rng = random.Random(derive_seed(context.seed, "words"))
    words = [w for w in SentimentIntensityAnalyzer().lexicon if w.isalpha() and w.isascii() and 3 <= len(w) <= 5]
    rng.shuffle(words)
    train, test, steps = (16, 8, 2) if context.quick else (640, 120, 40)

    def row_of(word: str) -> dict[str, str]:
        return {"prompt": f"{word}:", "completion": " " + word.upper()}

    tokenizer = load_tokenizer(context.model)
    arms: Arms = {}
    for name, setting in settings.items():
        model = load_model(context.model, dtype="float32", packed=True)
        tune(
            context, model, tokenizer, [row_of(w) for w in words[:train]], setting, steps, 16, 2e-4, f"capitals, {name}"
        )
        held = [row_of(w) for w in words[train : train + test]]
        texts = continuations(model, tokenizer, [row["prompt"] for row in held], 8, 120, sample=False)
        right = [float(t.strip() == row["completion"].strip()) for t, row in zip(texts, held, strict=True)]
        arms[name] = {"capitals, exact match": right}
        del model
    return arms


REPRODUCTION = Reproduction(
    name="ift",
    summary=(
        "SFT and IFT on the same demonstrations for equal steps: Frozen Lake under its own rollouts, and words in "
        "capitals by the embedded model"
    ),
    run=run,
    claims=[
        Claim("Frozen Lake success, greedy", "IFT", "SFT", "comparable or better", kind="difference", why=WHY),
        Claim("Frozen Lake success, sampled", "IFT", "SFT", "comparable or better", kind="difference", why=WHY),
        Claim("capitals, exact match", "IFT", "SFT", "comparable or better", kind="difference", why=WHY),
    ],
    seeds=3,
    extra=("train", "trl"),
)
