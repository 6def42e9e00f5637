"""Every field of TRL's configurations: a value other than the default changes what comes out, or its name is in an
error. A field that is new in TRL or transformers is in no table here, and fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from transformers import TrainingArguments

from everytoken.preference.ift import IFTTrainer
from everytoken.preference.trainer import PreferenceTrainer
from everytoken.reinforcement.rto import RTOConfig, RTOSettings, RTOTrainer
from everytoken.testing.models import tiny_llama, tiny_tokenizer

from ..tiers import commit_tier
from ..trainer_settings import trainer_settings


@dataclass
class Changes:
    """The run with ``value`` ends elsewhere than the run without, both with the settings ``beside``."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Refused:
    """The configuration or the trainer raises, and the message names the field."""

    value: Any
    beside: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Apart:
    """Not run here, and why: it changes cost, display or loading only, or needs what this machine lacks."""

    why: str


COST, LOADING = Apart("cost only"), Apart("says how a model is loaded by its name")
SYNC = {"sync_ref_model": True, "ref_model_sync_steps": 1}

# What transformers' Trainer does around the loss, with code that no trainer here overrides.
TRAINERS_OWN = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
auto_find_batch_size average_tokens_across_devices batch_eval_metrics data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters
ddp_static_graph ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train enable_jit_checkpoint
eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object
fp16 fsdp fsdp_config full_determinism gradient_checkpointing gradient_checkpointing_kwargs greater_is_better
hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token ignore_data_skip include_for_metrics
include_num_input_tokens_seen label_names length_column_name load_best_model_at_end local_rank log_level
log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
lr_scheduler_kwargs lr_scheduler_type metric_for_best_model num_train_epochs optim optim_args optim_target_modules
output_dir parallelism_config per_device_eval_batch_size prediction_loss_only project push_to_hub
remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
save_on_each_node save_only_model save_steps save_strategy save_total_limit skip_memory_metrics tf32 torch_compile
torch_compile_backend torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id
trackio_static_space_id train_sampling_strategy use_cache use_cpu
""".split()  # noqa: SIM905

INHERITED = {
    "bf16": Changes(True),
    "gradient_accumulation_steps": Changes(2),
    "label_smoothing_factor": Refused(0.1),
    "learning_rate": Changes(0.3),
    "liger_kernel_config": Refused({"rope": True}),
    "max_grad_norm": Changes(1e-3),
    "max_steps": Changes(1),
    "neftune_noise_alpha": Changes(5.0),
    "per_device_train_batch_size": Changes(4),
    "seed": Changes(1),
    "use_liger_kernel": Refused(True),
    "warmup_steps": Changes(2, {"lr_scheduler_type": "constant_with_warmup"}),
    "weight_decay": Changes(0.5),
}

DPO = INHERITED | {
    "activation_offloading": COST,
    "beta": Changes(0.5),
    "bf16_full_eval": Refused(True),
    "dataset_num_proc": COST,
    "disable_dropout": Changes(False),
    "discopop_tau": Refused(0.1),
    "f_alpha_divergence_coef": Refused(0.7),
    "f_divergence_type": Refused("js_divergence"),
    "fp16_full_eval": Refused(True),
    "label_smoothing": Refused(0.1),
    "ld_alpha": Refused(0.5),
    "loss_type": Refused(["hinge"]),
    "loss_weights": Refused([0.5]),
    "max_length": Changes(6),
    "model_init_kwargs": Refused({"dtype": "bfloat16"}),
    "pad_to_multiple_of": Changes(32),
    "pad_token": Changes("k"),
    "padding_free": Refused(True),
    "precompute_ref_batch_size": COST,
    "precompute_ref_log_probs": Changes(True),
    "ref_model_mixup_alpha": Changes(0.1, SYNC),
    "ref_model_sync_steps": Changes(2, SYNC),
    "router_aux_loss_coef": Refused(0.1),  # of a model without experts; with experts: test_reference.py
    "sync_ref_model": Changes(True, {"ref_model_sync_steps": 1}),
    "truncation_mode": Changes("keep_end", {"max_length": 8}),
    "trust_remote_code": LOADING,
    "use_weighting": Refused(True),
}

SFT = INHERITED | {
    "activation_offloading": COST,
    "assistant_only_loss": Refused(True),  # TRL: it needs conversations
    "bf16_full_eval": Apart("rounds the model for its evaluation, as transformers says"),
    "chat_template_path": LOADING,
    "completion_only_loss": Changes(False),
    "dataset_kwargs": Refused({"add_special_tokens": False}),
    "dataset_num_proc": COST,
    "dataset_text_field": Apart("names the column of rows of plain text"),
    "eos_token": Changes("k"),
    "eval_packing": Refused(True),
    "fp16_full_eval": Apart("rounds the model for its evaluation, as transformers says"),
    "loss_type": Refused("dft"),
    "max_length": Changes(6),
    "model_init_kwargs": Refused({"dtype": "bfloat16"}),
    "packing": Refused(True),
    "packing_strategy": Refused("wrapped"),
    "pad_to_multiple_of": Changes(32),
    "pad_token": Changes("k"),
    "padding_free": Refused(True),
    "router_aux_loss_coef": Refused(0.1),
    "shuffle_dataset": Changes(True),
    "truncation_mode": Changes("keep_end", {"max_length": 8}),
    "trust_remote_code": LOADING,
}

VLLM = Apart("rollouts by vLLM, which needs an accelerator")
SHOWN = Apart("what is shown of the rollouts")
STALE = {"num_iterations": 2, "learning_rate": 0.3, "max_steps": 4}  # steps on rollouts of an older policy
ENTROPY = {"use_adaptive_entropy": True, "entropy_target": 1e9, "entropy_coef": 0.05, "max_steps": 4}
GRPO = INHERITED | {
    "beta": Refused(0.1),
    "bf16_full_eval": Refused(True),
    "cache_implementation": COST,
    "cast_lm_head_to_fp32": Refused(True),
    "chat_template_kwargs": Apart("arguments of a chat template, as TRL applies it"),
    "delta": Changes(0.5, STALE),
    "disable_dropout": Changes(True),
    "ds3_gather_for_generation": COST,
    "entropy_coef": Changes(0.5),
    "entropy_coef_delta": Changes(0.5, ENTROPY),
    "entropy_coef_max": Changes(0.01, ENTROPY),
    "entropy_coef_min": Changes(0.3, ENTROPY | {"entropy_target": 0.0}),
    "entropy_target": Changes(0.0, ENTROPY),
    "epsilon": Changes(1e-3, STALE),
    "epsilon_high": Changes(1e-3, STALE),
    "fp16_full_eval": Refused(True),
    "generation_batch_size": Changes(16),
    "generation_kwargs": Changes({"top_k": 2}),
    "importance_sampling_level": Changes("sequence", STALE),
    "log_completions": SHOWN,
    "log_completions_hub_repo": SHOWN,
    "log_multimodal": SHOWN,
    "log_unique_prompts": SHOWN,
    "loss_type": Changes("bnpo"),
    "mask_truncated_completions": Changes(True),
    "max_completion_length": Changes(3),
    "max_tool_calling_iterations": Apart("of prompts with tools"),
    "min_p": Changes(0.3),
    "model_init_kwargs": Refused({"dtype": "bfloat16"}),
    "multi_objective_aggregation": Refused("normalize_then_sum"),
    "num_completions_to_print": SHOWN,
    "num_generations": Changes(2),
    "num_generations_eval": Apart("of an evaluation's rollouts"),
    "num_iterations": Changes(2, {"max_steps": 4}),
    "off_policy_mask_threshold": Refused(0.5),
    "pad_to_multiple_of": Changes(32),
    "per_device_train_batch_size": Changes(4),
    "ref_model_mixup_alpha": Refused(0.1),
    "ref_model_sync_steps": Refused(2),
    "repetition_penalty": Changes(1.5),
    "reward_weights": Changes([3.0]),
    "router_aux_loss_coef": Refused(0.1),
    "sapo_temperature_neg": Changes(2.0, STALE | {"loss_type": "sapo"}),
    "sapo_temperature_pos": Changes(2.0, STALE | {"loss_type": "sapo"}),
    "scale_rewards": Refused("batch"),
    "shuffle_dataset": Changes(False),
    "steps_per_generation": Changes(2),
    "sync_ref_model": Refused(True),
    "temperature": Changes(0.5),
    "top_entropy_quantile": Changes(0.3),
    "top_k": Changes(2),
    "top_p": Changes(0.5),
    "transformers_continuous_batching_config": COST,
    "trust_remote_code": LOADING,
    "use_adaptive_entropy": Changes(True, {name: value for name, value in ENTROPY.items() if "use" not in name}),
    "use_bias_correction_kl": Refused(False),
    "use_transformers_continuous_batching": COST,
    "use_transformers_paged": COST,
    "use_vllm": VLLM,
    "vespo_k_neg": Refused(1.0),
    "vespo_k_pos": Refused(1.0),
    "vespo_lambda_neg": Refused(1.0),
    "vespo_lambda_pos": Refused(1.0),
}
VLLM_FIELDS = [
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_structured_outputs_regex",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
    "vllm_importance_sampling_cap",
]
GRPO |= dict.fromkeys(VLLM_FIELDS, VLLM)
RTO = GRPO | {
    "critic_epochs": Changes(3, {"max_steps": 3}),
    "critic_lr": Changes(0.3, {"max_steps": 3}),
    "dpo_reward_clip": Changes(1e-4),
    "dpo_reward_scale": Changes(0.5),
    "estimator": Changes("group"),
    "gae_lambda": Changes(0.3),
    "gamma": Changes(0.5),
    "init_kl_coef": Changes(0.5, STALE),
    "normalize_rewards": Changes(True),
    "reward_clip": Changes(0.01),
    "reward_scale": Changes(0.1),
    "value_clip": Changes(1e-6, {"critic_epochs": 3, "critic_lr": 0.3, "max_steps": 3}),
}

SETTINGS = dict(per_device_train_batch_size=2, max_steps=2, lr_scheduler_type="constant")


def model(seed: int = 1) -> Any:
    """A Llama with dropout behind its first activation: a module, for that is what TRL switches off."""
    made = tiny_llama(len(tiny_tokenizer()), seed=seed, eos=0)
    mlp = made.model.layers[0].mlp
    mlp.act_fn = torch.nn.Sequential(mlp.act_fn, torch.nn.Dropout(0.3))
    return made


def dpo(folder: str, **changes: Any) -> Any:
    rows = [
        {"prompt": "abc", "chosen": "defgh", "rejected": "hgf"},
        {"prompt": "bcda", "chosen": "ahhg", "rejected": "efefefef"},
        {"prompt": "e", "chosen": "edcba", "rejected": "b"},
        {"prompt": "kja", "chosen": "bb", "rejected": "cck"},
    ]
    return PreferenceTrainer(
        model(), ref_model=model(2), args=trl.DPOConfig(**trainer_settings(folder, **SETTINGS | changes)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def sft(folder: str, **changes: Any) -> Any:
    rows = [
        {"prompt": "abc", "completion": "defgh"}, {"prompt": "bcda", "completion": "hgfab"},
        {"prompt": "e", "completion": "edcba"}, {"prompt": "kja", "completion": "bbc"},
    ]  # fmt: skip
    return IFTTrainer(
        model(), args=trl.SFTConfig(**trainer_settings(folder, **SETTINGS | changes)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def score(completions: list[str], **_: Any) -> list[float]:
    return [text.count("a") + len(set(text)) / 10 for text in completions]


def rto(folder: str, **changes: Any) -> Any:
    own = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=6, critic_lr=1e-3)
    rows = [{"prompt": text} for text in ("abc", "bcda", "e", "kja")]
    policy = model()
    policy.generation_config.pad_token_id = 1
    return RTOTrainer(
        policy, reward_funcs=score, dpo_model=model(3),
        args=RTOConfig(**trainer_settings(folder, **SETTINGS | own | changes)),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tiny_tokenizer(),
    )  # fmt: skip


def outcome(made: Any) -> list[Any]:
    """What a run ends with: its weights, its logs, a batch's shapes and tokens, and whether a reference is held."""
    torch.manual_seed(made.args.seed)
    made.train()
    unlike = ("runtime", "per_second", "step_time", "flos")
    logs = [
        {name: value for name, value in entry.items() if not any(word in name for word in unlike)}
        for entry in made.state.log_history
    ]
    weights = torch.cat([weight.detach().flatten() for weight in made.model.parameters()])
    batch = next(iter(made.get_train_dataloader()))
    seen = None
    if isinstance(batch, dict):
        seen = {name: (tuple(value.shape), value.sum().item()) for name, value in batch.items()}
    return [weights.sum().item(), weights.abs().sum().item(), str(logs), seen, getattr(made, "ref_model", 0) is None]


KINDS = {"DPOConfig": (dpo, DPO), "SFTConfig": (sft, SFT), "GRPOConfig": (rto, GRPO)}
CASES = [(kind, name, case) for kind, (_, table) in {**KINDS, "RTOConfig": (rto, RTO)}.items()
         for name, case in sorted(table.items()) if kind != "RTOConfig" or name not in GRPO]  # fmt: skip
RUNNERS = {**{kind: make for kind, (make, _) in KINDS.items()}, "RTOConfig": rto}


@pytest.mark.parametrize(("config", "table"), [
    (trl.DPOConfig, DPO), (trl.SFTConfig, SFT), (trl.GRPOConfig, GRPO), (RTOConfig, RTO),
])  # fmt: skip
def test_every_field_is_in_a_table(config, table):
    fields = {item.name for item in dataclasses.fields(config)}
    known = {*table, *TRAINERS_OWN}
    assert fields - known == set(), "new fields: honour or refuse them, and say here what they do"
    assert known - fields == set(), "fields that are gone"
    assert set(TRAINERS_OWN) <= {item.name for item in dataclasses.fields(TrainingArguments)}
    assert {item.name for item in dataclasses.fields(RTOSettings)} <= set(RTO)


def identified(case: tuple[str, str, Any]) -> str:
    return f"{case[0]}.{case[1]}"


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case[2], Refused)], ids=identified)
def test_what_would_change_nothing_is_refused_by_its_name(tmp_path, case):
    kind, name, how = case
    with pytest.raises((ValueError, NotImplementedError), match=name):
        RUNNERS[kind](str(tmp_path), **how.beside, **{name: how.value})


BASELINES: dict[str, list[Any]] = {}
"""How a run without the field ends, by what it is made of: many fields are compared with the same one."""


def baseline(folder: str, kind: str, beside: Mapping[str, Any]) -> list[Any]:
    key = f"{RUNNERS[kind].__name__} {sorted(beside.items())}"
    if key not in BASELINES:
        BASELINES[key] = outcome(RUNNERS[kind](folder, **beside))
    return BASELINES[key]


def run_changes(tmp_path: Any, case: tuple[str, str, Changes]) -> None:
    kind, name, how = case
    changed = outcome(RUNNERS[kind](str(tmp_path), **{**how.beside, name: how.value}))
    assert baseline(str(tmp_path), kind, how.beside) != changed


@pytest.mark.parametrize("kind", commit_tier(KINDS, ["DPOConfig"]))
def test_a_run_that_changes_nothing_ends_the_same(tmp_path, kind):
    """Without this, any two runs would differ, and so would say nothing about a field."""
    assert baseline(str(tmp_path), kind, {}) == outcome(RUNNERS[kind](str(tmp_path)))


CHANGES = [case for case in CASES if isinstance(case[2], Changes)]
QUICK = ("beta", "max_length", "precompute_ref_log_probs")


@pytest.mark.parametrize(
    "case", [case for case in CHANGES if case[0] == "DPOConfig" and case[1] in QUICK], ids=identified
)
def test_what_is_honoured_changes_the_result(tmp_path, case):
    run_changes(tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CHANGES if case[0] != "DPOConfig" or case[1] not in QUICK], ids=identified
)
def test_every_other_honoured_field_changes_the_result(tmp_path, case):
    run_changes(tmp_path, case)


def test_a_beta_beside_a_loss_is_refused(tmp_path):
    from everytoken.core.errors import BadInputError
    from everytoken.preference.dpo import DPOLoss

    def made(loss_beta, beta):
        return PreferenceTrainer(
            model(), ref_model=model(2), loss=DPOLoss(beta=loss_beta),
            args=trl.DPOConfig(**trainer_settings(tmp_path, beta=beta, **SETTINGS)),
            train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip

    made(0.5, 0.5)
    made(0.5, 0.1)  # TRL's default says nothing
    with pytest.raises(BadInputError, match=r"args\.beta=0\.3"):
        made(0.5, 0.3)
