"""A TDPO training step against TRL's own DPO step: time and peak memory, each arm in a fresh process, same batches."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

ARMS = ("TRL DPO", "ours DPO", "ours TDPO2")
STEPS, BATCH, PROMPT, RESPONSE = 6, 4, 24, 104


def arm(name: str) -> None:
    """Trains a few steps and prints ``{"seconds": [...], "peak": bytes}``."""
    import resource
    import time

    import datasets
    import torch
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from everytoken.core.loading import load_model, load_tokenizer
    from everytoken.preference.dpo import DPOLoss
    from everytoken.preference.tdpo import TDPOLoss
    from everytoken.preference.trainer import PreferenceTrainer

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    words = torch.randint(1000, 40_000, (STEPS * BATCH, 3, RESPONSE)).tolist()
    rows = [
        {
            "prompt": tokenizer.decode(row[0][:PROMPT]),
            "chosen": tokenizer.decode(row[1]),
            "rejected": tokenizer.decode(row[2]),
        }
        for row in words
    ]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=STEPS, report_to=[], logging_strategy="no",
            save_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True, max_length=None,
        )  # fmt: skip
        common = dict(
            ref_model=load_model(dtype="float32"), args=args, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        model = load_model(dtype="float32")
        if name == "TRL DPO":
            trainer = DPOTrainer(model, **common)
        else:
            loss = {"ours DPO": DPOLoss(), "ours TDPO2": TDPOLoss()}[name]
            trainer = PreferenceTrainer(model, loss=loss, **common)
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT" + json.dumps({"seconds": times[1:], "peak": peak}))


def main() -> None:
    from common import report

    found: dict[str, dict] = {name: {"seconds": [], "peak": []} for name in ARMS}
    for _ in range(2):
        for name in ARMS:
            run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
            lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
            if not lines:
                raise SystemExit(run.stderr[-3000:])
            data = json.loads(lines[-1][6:])
            found[name]["seconds"] += data["seconds"]
            found[name]["peak"].append(data["peak"])
    rows = []
    base = found["TRL DPO"]
    for name, data in found.items():
        step, peak = statistics.median(data["seconds"]), statistics.median(data["peak"])
        rows.append(
            {
                "arm": name,
                "seconds a step": step,
                "ratio": step / statistics.median(base["seconds"]),
                "peak memory, GB": peak / 1e9,
                "memory ratio": peak / statistics.median(base["peak"]),
            }
        )
    report(
        "preference",
        rows,
        f"{BATCH} pairs of {PROMPT} + {RESPONSE} tokens, float32, medians of {2 * (STEPS - 1)} steps in two processes; peak is the "
        "process's maximum resident set (two models, gradients and AdamW's states included). Goal: 1.1 at most.",
    )


if __name__ == "__main__":
    arm(sys.argv[1]) if len(sys.argv) > 1 else main()
