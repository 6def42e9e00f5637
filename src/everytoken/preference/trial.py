"""Trials of preference losses: DPO and each loss train a copy of the model for a few steps on the same pairs."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from ..core.errors import BadInputError, require
from ..core.trials import Trial, TrialRequest, TrialResult

EXAMPLE = [
    {"prompt": "The hotel was", "chosen": " lovely, quiet and very clean.", "rejected": " awful, loud and very dirty."},
    {
        "prompt": "Our waiter",
        "chosen": " was kind and made us feel welcome.",
        "rejected": " was rude and ruined the evening.",
    },
    {
        "prompt": "The film is",
        "chosen": " a joy from the first scene on.",
        "rejected": " a bore from the first scene on.",
    },
    {"prompt": "In the end, the trip", "chosen": " was the best of my life.", "rejected": " was a waste of my money."},
]


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Preference rows of a JSONL file: ``prompt``, ``chosen`` and ``rejected``, plain text.

    Raises:
        BadInputError: no file, or a bad row, which it names.
    """
    if not path.is_file():
        raise BadInputError(f"There is no file {path}.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadInputError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise BadInputError(f"{path}, line {number}: not an object.")
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(row.get(name), str) or not row[name]:
                raise BadInputError(f"{path}, line {number}: {name!r} must be non-empty text.")
        if row["chosen"] == row["rejected"]:
            raise BadInputError(f"{path}, line {number}: chosen and rejected are identical.", "Remove such rows.")
        rows.append({name: row[name] for name in ("prompt", "chosen", "rejected")})
    if not rows:
        raise BadInputError(f"{path} holds no pairs.")
    return rows


def trial(request: TrialRequest) -> TrialResult:
    """Margins, divergence and time after a few steps; see ``core.trials``."""
    require("trl", "train", "Trying a preference loss")
    pairs = read_pairs(Path(request.data)) if request.data is not None else EXAMPLE
    from .dpo import DPOLoss

    arms = [Trial("DPO", DPOLoss), *request.trials]
    losses = {item.name: item.factory(**item.settings) for item in arms}
    import datasets
    from transformers.utils import logging

    from ..core.loading import load_model, load_tokenizer
    from ..core.rng import seed_everything
    from .traces import credit_trace

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    request.report("loading the model")
    tokenizer = load_tokenizer(request.model)
    reference = load_model(request.model, dtype="float32")
    steps = int(request.options.get("steps", 6))
    result = TrialResult({}, "reward margin", column="implicit_reward")
    for name, loss in losses.items():
        request.report(f"{name}: {steps} steps on {len(pairs)} pairs")
        seed_everything(int(request.options.get("seed", 0)))
        policy = load_model(request.model, dtype="float32")  # not a copy: trainers patch their models
        began = time.perf_counter()
        _train(policy, reference, loss, tokenizer, pairs, steps, float(request.options.get("lr", 1e-5)))
        seconds = time.perf_counter() - began
        margins, kls = [], {"chosen": [], "rejected": []}  # type: ignore[var-annotated]
        traces = []
        for index, pair in enumerate(pairs[:8]):
            rewards = {}
            for side in ("chosen", "rejected"):
                title = f"{name}, {side}: {pair['prompt']}"
                trace = credit_trace(
                    policy, reference, tokenizer, pair["prompt"], pair[side], getattr(loss, "beta", 0.1), title
                )
                rewards[side] = sum(trace.columns["implicit_reward"])  # type: ignore[arg-type]
                kls[side].append(sum(trace.columns["forward_kl"]))  # type: ignore[arg-type]
                if index < 2:
                    traces.append(trace)
            margins.append(rewards["chosen"] - rewards["rejected"])
        if name != "DPO":
            result.traces += traces
        result.rows[name] = {
            "reward margin": sum(margins) / len(margins),
            "KL chosen": sum(kls["chosen"]) / len(margins),
            "KL rejected": sum(kls["rejected"]) / len(margins),
            "seconds": seconds,
        }
    return result


def _train(policy: Any, reference: Any, loss: Any, tokenizer: Any, pairs: list[dict], steps: int, lr: float) -> None:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    from .trainer import PreferenceTrainer, quiet_config

    with tempfile.TemporaryDirectory() as folder:
        args = quiet_config(
            folder,
            per_device_train_batch_size=min(4, len(pairs)),
            max_steps=steps,
            learning_rate=lr,
            lr_scheduler_type="constant",
        )
        trainer = PreferenceTrainer(
            policy,
            ref_model=reference,
            loss=loss,
            args=args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        policy.eval()
