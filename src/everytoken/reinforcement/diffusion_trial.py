"""``everytoken try`` for methods whose models write in any order: one group of rollouts, and the credit of each token.

Nothing is trained. Every arm writes a group of rollouts of one prompt with the same seeds, verifies them, and says by
how much a rise of each token's log-probability would lower its loss. The baseline is diffu-GRPO. Where no token of the
first prompt's rollouts has any credit for some arm, the next one of a few is taken.
"""

from __future__ import annotations

import tempfile
from typing import Any

from ..core.errors import BadInputError, require
from ..core.quiet import quiet_training
from ..core.rng import derive_seed, seed_everything
from ..decoding.canvas.base import CanvasSampler
from ..decoding.canvas.loading import load_denoiser
from ..decoding.canvas.replay import replay_html
from ..decoding.trial import Trial, TrialRequest, TrialResult
from ..training.datasets.pairs import read_rows

HEADLINE = "largest credit of a token, over the mean"
GROUP, PROMPTS = 4, 8


def trial(request: TrialRequest) -> TrialResult:
    """Judges rollouts of the prompt: a sudoku of four by four, or the first row of ``--data`` with ``prompt`` and
    ``answer``, whose reward is 1 where the text is the answer, else the share of its characters that are right.

    Raises:
        BadInputError: a prompt that is no sudoku without data, data without an answer, or settings out of range.
        UnsupportedModelError: a causal model.
    """
    require("trl", "train", "Trying a method that trains")
    from ..core.loading import load_tokenizer
    from ..core.weights import weights_folder
    from .canvas_pictures import Judged, canvas_traces, judged
    from .canvas_pieces import DiffuGRPO

    methods = {"diffu-GRPO": DiffuGRPO()} | {item.name: item.factory(**item.settings) for item in request.trials}
    rows, reward = _rows(request)
    request.report("loading the model", 0, 0)
    weights = str(weights_folder(CanvasSampler.weights))
    name = weights if request.model is None else request.model
    load_denoiser(request.model)  # what the model is becomes known to the Auto classes by this
    tokenizer = load_tokenizer(name)
    groups: dict[str, Judged] = {}
    trainers = {
        arm: _trainer(request, load_denoiser(request.model), tokenizer, method, rows[0], reward)
        for arm, method in methods.items()
    }
    for number, row in enumerate(rows):
        for arm, trainer in trainers.items():
            request.report(f"judging rollouts of {arm}", number, len(rows))
            seed_everything(derive_seed(int(request.options.get("seed", 0)), "rollouts", number))  # arms draw alike
            with quiet_training():
                groups[arm] = judged(trainer, row)
        if all(bool((group.credit != 0).any()) for group in groups.values()):
            break
    result = TrialResult({}, HEADLINE, column="credit")
    for arm, group in groups.items():
        credit = group.credit.abs()[group.found.editable]
        mean = float(credit.mean())
        result.rows[arm] = {
            HEADLINE: float(credit.max()) / mean if mean else 0.0,
            "tokens with credit": float((credit > 0).float().mean()),
            "mean reward": float(group.rewards.mean()),
            "log-likelihood a token": group.logp,
            "forwards of a rollout": float(group.found.forwards),
            "forwards of a loss": group.forwards,
        }
        result.texts[arm] = tokenizer.decode(group.found.final_ids[0], skip_special_tokens=True)
        if arm in [item.name for item in request.trials]:
            result.traces += canvas_traces(group, tokenizer, arm)
            result.pictures.append(replay_html(group.found, 0, tokenizer, f"{arm}: the first rollout, step by step"))
    if not any(bool((group.credit != 0).any()) for group in groups.values()):
        result.notes.append("All rollouts of a group have equal rewards: there is no credit to give.")
    result.notes.append(
        "Credit: by how much a rise of a token's log-probability lowers the loss of its rollout. Nothing was trained."
    )
    return result


def trace_columns(item: Trial) -> tuple[str, ...]:
    """The columns of a method's traces."""
    from .canvas_pictures import COLUMNS

    return COLUMNS


def _rows(request: TrialRequest) -> tuple[list[dict[str, Any]], Any]:
    from .diffusion_training import sudoku_reward, sudoku_rows

    if request.data is not None:
        rows = read_rows(request.data)
        if request.prompt is not None:
            raise BadInputError("--data has the prompt already.", "Give one of --prompt and --data.")
        if not isinstance(rows[0].get("prompt"), str) or not isinstance(rows[0].get("answer"), str):
            raise BadInputError(f"{request.data}, row 0: needs texts 'prompt' and 'answer'.")
        return rows[:1], answer_reward
    if request.prompt is None:
        return sudoku_rows(PROMPTS, 1, 10, held=True), sudoku_reward
    marks = "".join(request.prompt.split())
    if len(marks) != 16 or set(marks) - set(".1234") or "." not in marks:
        raise BadInputError(
            "This prompt is no sudoku of 16 cells, and other texts need an answer that they can be compared with.",
            "Give --data rows.jsonl with a prompt and an answer.",
        )
    return [{"prompt": request.prompt}], sudoku_reward


def answer_reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 for the answer itself, else the share of its characters that stand at their place."""
    return [
        sum(one == other for one, other in zip(text, wanted, strict=False)) / max(len(text), len(wanted), 1)
        for text, wanted in zip(completions, answer, strict=True)
    ]


def _trainer(request: TrialRequest, model: Any, tokenizer: Any, method: Any, row: dict[str, Any], reward: Any) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig

    from ..training.quiet import quiet_arguments
    from .diffusion_trainer import DiffusionGRPOTrainer

    seed, heat = int(request.options.get("seed", 0)), float(request.options.get("temperature", 0.0))
    settings = dict(
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=int(request.options.get("max_new_tokens", 128)),
        temperature=heat or 1.0,  # 0 is the command line's default, and a group must differ
        max_steps=1,
        seed=seed,
    )
    if tokenizer.pad_token_id is None:
        raise BadInputError("This tokenizer has no token for padding.", "Set tokenizer.pad_token, and save it.")
    with tempfile.TemporaryDirectory() as folder, quiet_training():
        return DiffusionGRPOTrainer(
            model,
            recipe=method.recipe(),
            mask_id=tokenizer.mask_token_id,
            reward_funcs=reward,
            args=GRPOConfig(**quiet_arguments(folder, **settings | method.arguments())),
            train_dataset=Dataset.from_list([row]),
            processing_class=tokenizer,
        )
