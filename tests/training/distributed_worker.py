"""Trains a tiny model as one of several processes (or alone) and writes the weights; run by test_distributed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path[0] = str(Path(__file__).parents[2])  # not this folder: its datasets/ would hide the library of that name

import datasets
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from trl import DPOConfig, SFTConfig

from everytoken.cli.common import leave_processes
from everytoken.core.loading import load_tokenizer
from everytoken.preference.columns import ModelLogps
from everytoken.preference.ift import IFTTrainer
from everytoken.preference.tdpo import TDPOLoss
from everytoken.preference.tgdpo import TGDPOLoss
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.reinforcement.rto import RTOConfig, RTOTrainer
from tests.conftest import tiny_llama
from tests.preference.test_ift import ROWS as DEMONSTRATIONS
from tests.preference.test_trainer import ROWS
from tests.reinforcement.test_rto import PROMPTS, score
from tests.trainer_settings import trainer_settings

datasets.disable_progress_bars()


def main(kind: str, out: Path, size: int) -> None:
    tokenizer = load_tokenizer()
    model, reference, guide = (tiny_llama(49152, seed=seed, eos=2) for seed in (1, 2, 3))
    settings = trainer_settings(out / "run", per_device_train_batch_size=size, max_steps=2, learning_rate=1e-3)
    common = dict(processing_class=tokenizer)
    if kind in ("tdpo", "tgdpo"):
        loss = TDPOLoss() if kind == "tdpo" else TGDPOLoss()
        annotators = [] if kind == "tdpo" else [ModelLogps(guide)]
        trainer = PreferenceTrainer(
            model,
            ref_model=reference,
            loss=loss,
            annotators=annotators,
            args=DPOConfig(**settings),
            train_dataset=datasets.Dataset.from_list(ROWS),
            **common,
        )
    elif kind == "ift":
        trainer = IFTTrainer(
            model, args=SFTConfig(**settings), train_dataset=datasets.Dataset.from_list(DEMONSTRATIONS), **common
        )
    else:
        model.generation_config.pad_token_id = 2
        if kind == "group":  # this one with a DPO adapter, which holds the reference too
            torch.manual_seed(4)
            guide = get_peft_model(
                tiny_llama(49152, seed=1, eos=2), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            )
        args = RTOConfig(**settings, estimator=kind, num_generations=4, max_completion_length=5)
        trainer = RTOTrainer(
            model,
            reward_funcs=score,
            dpo_model=guide,
            args=args,
            train_dataset=datasets.Dataset.from_list(PROMPTS),
            **common,
        )
    trainer.train()
    # every model that takes part, by where its weights lie
    models = [
        trainer.model,
        *(getattr(trainer, name, None) for name in ("ref_model", "rto_reference", "dpo_model", "critic")),
    ]
    sharded = [any(isinstance(w, DTensor) for w in m.parameters()) for m in models if m is not None]
    state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        torch.save(
            {"weights": {name: weight.cpu() for name, weight in state.items()}, "logs": logs, "sharded": sharded},
            out / "state.pt",
        )
    trainer.accelerator.wait_for_everyone()
    leave_processes()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
