"""A training step of every preference method against its own baseline: time and peak memory, each arm in a fresh
process, same batches.

Losses on pairs against TRL's DPO; IFT against TRL's SFT; RTO with a critic against PPO (the same trainer without the
DPO reward, since TRL has no PPO any more), RTO without one against TRL's GRPO with a KL term.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile

FAMILIES = {
    "TRL DPO": ("DPO", "DPO, reference precomputed", "TDPO2", "TGDPO", "cDPO", "T-REG"),
    "TRL SFT": ("IFT",),
    "PPO": ("RTO", "RTO, DPO adapter"),
    "TRL GRPO": ("RTO, no critic", "RTO, no critic, DPO adapter"),
}
STEPS, BATCH, PROMPT, RESPONSE, ROLLOUTS, NEW = 6, 2, 24, 48, 8, 12
COLUMNS = {"TGDPO": "guide_logps", "cDPO": "contrast", "T-REG": "token_reward"}


def arm(name: str) -> None:
    """Trains a few steps and prints ``{"seconds": [...], "peak": bytes}``."""
    import resource
    import time

    import datasets
    import torch
    from transformers import TrainerCallback

    from everytoken.core.loading import load_model, load_tokenizer

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    words = torch.randint(1000, 40_000, (STEPS * BATCH, 3, RESPONSE)).tolist()
    pairs = []
    for prompt, chosen, rejected in words:
        row: dict = {"prompt_ids": prompt[:PROMPT], "chosen_ids": chosen, "rejected_ids": rejected}
        for side in ("chosen", "rejected"):
            values = torch.rand(RESPONSE).tolist()
            row |= {f"{side}_{column}": values for column in ("guide_logps", "contrast", "token_reward", "ref_logps")}
        pairs.append(row)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times.append(time.perf_counter() - self.began)

    class GenerationToo(Clock):
        """Rollouts are generated before ``on_step_begin``: time from step to step."""

        def on_step_begin(self, *args, **kwargs):
            pass

        def on_step_end(self, *args, **kwargs):
            now = time.perf_counter()
            if hasattr(self, "began"):
                times.append(now - self.began)
            self.began = now

    with tempfile.TemporaryDirectory() as folder:
        settings = dict(
            output_dir=folder, max_steps=STEPS, report_to=[], logging_strategy="no", save_strategy="no", bf16=False,
            gradient_checkpointing=False, disable_tqdm=True,
        )  # fmt: skip
        trainer = build(
            name, settings, load_model, tokenizer, pairs, Clock() if name in pair_arms() else GenerationToo()
        )
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT" + json.dumps({"seconds": times[1:], "peak": peak}))


def pair_arms() -> set[str]:
    return {"TRL DPO", *FAMILIES["TRL DPO"], "TRL SFT", *FAMILIES["TRL SFT"]}


def build(name, settings, load_model, tokenizer, pairs, clock):
    """The trainer of an arm."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    from everytoken.preference.cdpo import CDPOLoss
    from everytoken.preference.dpo import DPOLoss
    from everytoken.preference.ift import IFTSettings, IFTTrainer
    from everytoken.preference.t_reg import TREGLoss
    from everytoken.preference.tdpo import TDPOLoss
    from everytoken.preference.tgdpo import TGDPOLoss
    from everytoken.preference.trainer import PreferenceTrainer
    from everytoken.reinforcement.rto import RTOConfig, RTOTrainer

    model, common = load_model(dtype="float32"), dict(processing_class=tokenizer, callbacks=[clock])
    if name in ("TRL DPO", *FAMILIES["TRL DPO"]):
        precomputed = name.endswith("precomputed")
        args = DPOConfig(
            **settings, per_device_train_batch_size=BATCH, max_length=None, precompute_ref_log_probs=precomputed
        )
        reference = None if precomputed else load_model(dtype="float32")
        if name == "TRL DPO":
            rows = [
                {"prompt": tokenizer.decode(r["prompt_ids"]), "chosen": tokenizer.decode(r["chosen_ids"]),
                 "rejected": tokenizer.decode(r["rejected_ids"])}
                for r in pairs
            ]  # fmt: skip
            trainer = DPOTrainer(model, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), **common)
            tokens = (
                trainer.train_dataset
            )  # decoding and encoding may change lengths: both arms get the very same tokens
            trainer.train_dataset = Dataset.from_list(
                [{k: r[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for r in pairs]
            )
            assert len(tokens) == len(pairs)
            return trainer
        losses = {"TDPO2": TDPOLoss(), "TGDPO": TGDPOLoss(), "cDPO": CDPOLoss(), "T-REG": TREGLoss()}
        keep = {"prompt_ids", "chosen_ids", "rejected_ids"}
        column = COLUMNS.get(name, "ref_logps" if precomputed else None)
        keep |= set() if column is None else {f"chosen_{column}", f"rejected_{column}"}
        rows = [{key: row[key] for key in keep} for row in pairs]
        return PreferenceTrainer(
            model,
            ref_model=reference,
            loss=losses.get(name, DPOLoss()),
            args=args,
            train_dataset=Dataset.from_list(rows),
            **common,
        )
    if name in ("TRL SFT", *FAMILIES["TRL SFT"]):
        args = SFTConfig(**settings, per_device_train_batch_size=2 * BATCH, max_length=None)
        rows = [
            {"input_ids": r["prompt_ids"] + r[side], "labels": [-100] * PROMPT + r[side]}
            for r in pairs
            for side in ("chosen_ids", "rejected_ids")
        ]
        data = dict(args=args, train_dataset=Dataset.from_list(rows))
        if name == "TRL SFT":
            return SFTTrainer(model, **data, **common)
        return IFTTrainer(model, ift=IFTSettings(), **data, **common)
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.eos_token_id = None  # equal lengths in all arms
    rollouts = dict(
        per_device_train_batch_size=ROLLOUTS, num_generations=4, max_completion_length=NEW, num_iterations=2
    )
    data = dict(
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        train_dataset=Dataset.from_list([{"prompt": tokenizer.decode(row["prompt_ids"])} for row in pairs]),
    )
    if name == "TRL GRPO":
        return GRPOTrainer(model, args=GRPOConfig(**settings, **rollouts, beta=0.01), **data, **common)
    scale = 0.0 if name == "PPO" else 0.05
    args = RTOConfig(
        **settings, **rollouts, dpo_reward_scale=scale, estimator="group" if "no critic" in name else "gae"
    )
    dpo = load_model(dtype="float32") if scale else None
    if name.endswith("DPO adapter"):  # one model in memory for the DPO model and the reference
        dpo = get_peft_model(dpo, LoraConfig(r=16, target_modules="all-linear"))
    return RTOTrainer(model, dpo_model=dpo, args=args, **data, **common)


def main() -> None:
    from common import report

    rows = []
    for base, methods in FAMILIES.items():
        found: dict[str, dict] = {name: {"seconds": [], "peak": []} for name in (base, *methods)}
        for _ in range(1 if base in ("PPO", "TRL GRPO") else 2):  # by turns: a machine that slows down slows all
            for name in found:
                run = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
                lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
                if not lines:
                    raise SystemExit(run.stderr[-3000:])
                data = json.loads(lines[-1][6:])
                found[name]["seconds"] += data["seconds"]
                found[name]["peak"].append(data["peak"])
        # steps on rollouts alternate between writing them and using them again
        middle = statistics.fmean if base in ("PPO", "TRL GRPO") else statistics.median
        step, peak = middle(found[base]["seconds"]), statistics.median(found[base]["peak"])
        for name, data in found.items():
            rows.append(
                {
                    "arm": name if name == base else f"{name} (against {base})",
                    "seconds a step": middle(data["seconds"]),
                    "ratio": middle(data["seconds"]) / step,
                    "peak memory, GB": statistics.median(data["peak"]) / 1e9,
                    "memory ratio": statistics.median(data["peak"]) / peak,
                }
            )
    report(
        "preference",
        rows,
        f"{BATCH} pairs of {PROMPT} + {RESPONSE} tokens ({2 * BATCH} rows for SFT; {ROLLOUTS} rollouts of {NEW} "
        f"tokens used twice), the embedded "
        f"model in float32, medians of {2 * (STEPS - 1)} steps in two processes (rollouts: means of {STEPS - 2} in "
        f"one); peak is the process's maximum resident set (models, "
        "gradients and AdamW's states included). Goal: 1.1 at most for losses on pairs.",
    )


if __name__ == "__main__":
    arm(sys.argv[1]) if len(sys.argv) > 1 else main()
