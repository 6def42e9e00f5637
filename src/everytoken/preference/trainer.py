"""One trainer for every preference loss: a subclass of TRL's DPOTrainer.

TRL keeps what it does well: data preparation, padding, distribution, PEFT, checkpoints. This subclass replaces the loss: it
takes the last hidden states of policy and reference at the response positions only, computes per-token log-probabilities and
whatever else the loss ``needs`` in one chunked pass (``core.logprobs.token_stats``), and hands them to a ``PreferenceLoss``.
The ``[B, T, V]`` logits never exist, neither the policy's nor the reference's.

    trainer = PreferenceTrainer(model, loss=TDPOLoss(alpha=0.5), args=DPOConfig(...), train_dataset=..., processing_class=...)
"""

from __future__ import annotations

import types
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.logprobs import TokenStats, token_stats
from .base import NEEDS, PairScores, PreferenceLoss, PreferenceOutput

UNUSED_SETTINGS = {
    "precompute_ref_log_probs": (False, "per-token statistics need the reference model itself"),
    "padding_free": (False, "pairs are scored as padded rows"),
    "use_weighting": (False, "WPO weights belong to TRL's own losses"),
    "ld_alpha": (None, "it belongs to TRL's own losses"),
    "use_liger_kernel": (False, "the head is fused here already"),
    "reference_free": (False, "these losses compare with a reference, and without one they are undefined"),
}


def add_scored_forward(model: Any) -> None:
    """Adds ``score=`` to a causal model's forward: hidden states or token statistics instead of logits.

    ``model(input_ids=..., attention_mask=..., score={"mask": mask})`` returns the ``[N, D]`` hidden states that predict the
    masked tokens. With ``labels`` and reference states in ``score`` it returns TokenStats. Being inside ``forward``, it works
    under DDP and FSDP, which must see every use of a parameter.
    """
    original = model.forward
    if getattr(original, "_everytoken_scored", False):
        return
    text_config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(text_config, name, None)
        if value not in (None, 1, 1.0):
            raise UnsupportedModelError(
                f"{type(model).__name__} transforms its logits ({name}={value}), which the fused statistics do not follow."
            )

    def forward(self: Any, *args: Any, score: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if score is None:
            return original(*args, **kwargs)
        kwargs.pop("labels", None)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        hidden = hidden[:, -score["mask"].shape[1] - 1 : -1][score["mask"]]
        if "labels" not in score:
            return hidden
        head = self.get_output_embeddings()
        arguments: dict[str, Any] = {name: score.get(name) for name in ("ref_hidden", "ref_weight", "ref_bias")}
        arguments |= {name: name in score["needs"] for name in NEEDS}
        return token_stats(hidden, _whole(head.weight), score["labels"], bias=_whole(head.bias), **arguments)

    forward._everytoken_scored = True  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _whole(parameter: Any) -> Any:
    """A parameter, gathered if FSDP holds it in shards."""
    return parameter.full_tensor() if parameter is not None and hasattr(parameter, "full_tensor") else parameter


def quiet_config(folder: str, **settings: Any) -> DPOConfig:
    """A DPOConfig for short runs in float32 that log, save and report nothing."""
    return DPOConfig(
        output_dir=folder,
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )


class PreferenceTrainer(DPOTrainer):
    """TRL's DPOTrainer with a pluggable per-token loss.

    Args:
        loss: a PreferenceLoss; default DPO with ``args.beta``.
        kwargs: as for ``trl.DPOTrainer`` (``model``, ``ref_model``, ``args``, ``train_dataset``, ``peft_config``, ...).

    Raises:
        BadInputError: a DPOConfig setting that has no meaning here, or rows whose chosen and rejected are identical.
    """

    _tag_names = ["everytoken", "preference"]
    _name = "everytoken preference"

    def __init__(self, *positional: Any, loss: PreferenceLoss | None = None, **kwargs: Any):
        args: DPOConfig | None = kwargs.get("args")
        if args is None and len(positional) > 2:
            args = positional[2]
        for name, (default, why) in UNUSED_SETTINGS.items():
            if args is not None and getattr(args, name, default) not in (default, None):
                raise BadInputError(f"PreferenceTrainer does not support {name}={getattr(args, name)}: {why}.")
        if loss is None:
            from .dpo import DPOLoss

            loss = DPOLoss(beta=args.beta if args is not None else 0.1)
        self.preference_loss = loss
        super().__init__(*positional, **kwargs)
        self._refuse_ties(self.train_dataset)
        for model in (self.model, self.ref_model):
            if model is not None:
                unwrapped = self.accelerator.unwrap_model(model)
                base = unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
                add_scored_forward(base)

    @staticmethod
    def _refuse_ties(dataset: Any) -> None:
        names = getattr(dataset, "column_names", None) or []
        if "chosen_ids" not in names or not hasattr(dataset, "__len__"):
            return
        for index, (chosen, rejected) in enumerate(zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)):
            if list(chosen) == list(rejected):
                raise BadInputError(
                    f"Row {index} of the training data has identical chosen and rejected responses.",
                    "Remove such rows.",
                )
            if not len(chosen) or not len(rejected):
                raise BadInputError(f"Row {index} of the training data has an empty response.", "Remove such rows.")

    # -- scoring ---------------------------------------------------------------------------------------------------------
    def score_pairs(self, model: Any, inputs: dict[str, Any]) -> tuple[PairScores, PairScores]:
        """Per-token statistics of a collated batch (chosen rows, then rejected): ``(policy, reference)``."""
        mask = inputs["completion_mask"][:, 1:].bool()
        labels = inputs["input_ids"][:, 1:][mask]
        kept = {name: value for name, value in inputs.items() if name not in ("completion_mask",)}
        reference, head = self._reference(kept, mask)
        score = {
            "mask": mask,
            "labels": labels,
            "ref_hidden": reference,
            "ref_weight": _whole(head.weight).detach(),
            "ref_bias": None if head.bias is None else _whole(head.bias).detach(),
            "needs": self.preference_loss.needs,
        }
        stats: TokenStats = model(**kept, score=score)

        def spread(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            grid = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
            chosen, rejected = grid.masked_scatter(mask, values).chunk(2)
            return chosen, rejected

        masks = mask.chunk(2)
        policy = PairScores(*spread(stats.logps), *masks)
        assert stats.ref_logps is not None
        ref = PairScores(*spread(stats.ref_logps), *masks)
        for name in self.preference_loss.needs:
            policy.chosen[name], policy.rejected[name] = spread(getattr(stats, name))
        return policy, ref

    def _reference(self, kept: dict[str, Any], mask: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Hidden states ``[N, D]`` of the reference at the response positions, and its output head."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                model = self.accelerator.unwrap_model(self.ref_model)
                return self.ref_model(**kept, score={"mask": mask}), model.get_output_embeddings()
            model = self.accelerator.unwrap_model(self.model)
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                return self.model(**kept, score={"mask": mask}), model.get_output_embeddings()

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        policy, reference = self.score_pairs(model, inputs)
        output = self.preference_loss(policy, reference)
        loss = output.losses.mean()
        self._log_pairs(output, policy, inputs)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {self.state.global_step}; lower the learning rate or check the data."
            )
        if return_outputs:
            with torch.no_grad():
                return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        return loss

    def _log_pairs(self, output: PreferenceOutput, policy: PairScores, inputs: dict[str, Any]) -> None:
        """The metrics under TRL's names, plus those of the loss."""
        mode = "train" if self.model.training else "eval"
        if mode == "train":
            tokens = self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        values = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).float(),
            "rewards/margins": chosen - rejected,
            "logps/chosen": policy.chosen_logps.detach().sum(1),
            "logps/rejected": policy.rejected_logps.detach().sum(1),
        } | {name: value.reshape(1) for name, value in output.metrics.items()}
        for name, value in values.items():
            self._metrics[mode][name].append(self.accelerator.gather(value).float().mean().item())
