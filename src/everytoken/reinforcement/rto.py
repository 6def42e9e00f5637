"""RTO: Reinforced Token Optimization, DPO meets PPO (arXiv 2404.18922).

PPO for language models usually gets one reward, at the last token. A model trained with DPO carries a reward for every
token, its log-ratio to the reference. RTO adds it to the sparse reward and the KL penalty, and runs PPO on the sum. Per
response token t::

    r_dpo,t = beta_1 [log pi_dpo(y_t|.) - log ref(y_t|.)],  clamped to [-c, c]
    r_kl,t  = -beta_2 [log pi_old(y_t|.) - log ref(y_t|.)]
    r_t     = r_dpo,t + r_kl,t + 1[t is the last token] beta_3 clamp(RM(x, y), -10, 10)

Two estimators make advantages of them:

- ``"gae"`` (the paper's): a critic, and ``A_t = sum_{i >= t} (gamma lambda)^(i-t) [r_i + gamma V_{i+1} - V_i]``,
  whitened over the batch;
- ``"group"``: no critic. The sequence reward is compared with its group's mean, as in GRPO; the token rewards'
  return-to-go at t with the group's mean return-to-go at t (an answer that has ended has none left). Both are divided
  by the spread of the group's whole returns. Without token rewards this is GRPO (arXiv 2402.03300).

TRL no longer has a PPO trainer, so both run on its GRPOTrainer, which brings rollouts, reward functions, the clipped
surrogate, distribution, PEFT and vLLM; with ``dpo_reward_scale=0`` they are PPO and GRPO, the baselines::

    rows = dict(train_dataset=prompts, processing_class=tokenizer)
    trainer = RTOTrainer(model, reward_funcs=score, dpo_model=dpo, args=RTOConfig(...), **rows)
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from trl import GRPOConfig
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import disable_dropout_in_model

from ..core.errors import BadInputError, UnsupportedModelError
from ..core.logprobs import masked_mean, masked_sum
from ..core.scoring import check_guide, head_module
from ..training.arguments import Refusals, check_arguments
from ..training.distributed import frozen, in_shards, shard
from ..training.scored_forward import fused_like, reference_adapter
from .advantages import gae, group_advantages, last_token, whiten
from .critic import Critic, value_loss
from .rollouts import RolloutTrainer, check_columns, rollouts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
NO_KL = "it belongs to a KL term in the loss, and here the KL penalty is part of the reward"
ONE_ADVANTAGE = "it reads one advantage a response, and every token has its own here"
OWN_REFERENCE = "the reference is what the DPO model was trained from, and stays it"
REFUSALS: Refusals = {
    "use_bias_correction_kl": (True, NO_KL),
    "sync_ref_model": (False, OWN_REFERENCE),
    "ref_model_mixup_alpha": (0.6, OWN_REFERENCE),
    "ref_model_sync_steps": (512, OWN_REFERENCE),
    "multi_objective_aggregation": ("sum_then_normalize", "rewards are added up and belong to the last token"),
    "off_policy_mask_threshold": (None, ONE_ADVANTAGE),
    "vespo_k_pos": (2.0, ONE_ADVANTAGE),
    "vespo_lambda_pos": (3.0, ONE_ADVANTAGE),
    "vespo_k_neg": (3.0, ONE_ADVANTAGE),
    "vespo_lambda_neg": (2.0, ONE_ADVANTAGE),
    "cast_lm_head_to_fp32": (False, "it would change the policy's head and not those of the reference and DPO model"),
    "bf16_full_eval": (False, "it would round the policy and not the reference"),
    "fp16_full_eval": (False, "it would round the policy and not the reference"),
}
"""What has no meaning for rewards of tokens."""


def token_rewards(
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    dpo_logps: torch.Tensor | None,
    sequence_reward: torch.Tensor,
    mask: torch.Tensor,
    *,
    dpo_reward_scale: float = 0.05,
    dpo_reward_clip: float | None = 0.05,
    kl_coef: float = 0.01,
    reward_scale: float = 1.0,
    reward_clip: float | None = 10.0,
) -> torch.Tensor:
    """``r_t``, ``[B, T]``, exactly 0 outside ``mask``.

    Args:
        old_logps, ref_logps, dpo_logps: ``[B, T]`` of the response tokens; ``dpo_logps`` None leaves the DPO reward
            out.
        sequence_reward: ``[B]``; it goes to the last token of the mask (nowhere in an empty row).
        mask: ``[B, T]`` response tokens.
    """
    mask = mask.bool()
    rewards = -kl_coef * (old_logps - ref_logps)
    if dpo_logps is not None and dpo_reward_scale:
        shaped = dpo_reward_scale * (dpo_logps - ref_logps)
        rewards = rewards + (shaped if dpo_reward_clip is None else shaped.clamp(-dpo_reward_clip, dpo_reward_clip))
    rewards = torch.where(mask, rewards.float(), 0.0)
    end = reward_scale * sequence_reward.float()
    if reward_clip is not None:
        end = end.clamp(-reward_clip, reward_clip)
    return rewards + end[:, None] * last_token(mask)


@dataclass
class RTOSettings:
    """RTO's own settings, without those of the trainer.

    Args:
        estimator: ``"gae"`` with a critic, or ``"group"``.
        dpo_reward_scale: beta_1 (0.05); 0 is PPO or GRPO.
        dpo_reward_clip: c (0.05); None for no clamp.
        init_kl_coef: beta_2 (0.01).
        reward_scale: beta_3 (1).
        reward_clip: of the sequence reward (10).
        normalize_rewards: subtract the running mean of the sequence rewards and divide by their running standard
            deviation.
        gamma, gae_lambda: discount and GAE's trace (1, 0.95).
        critic_lr, critic_epochs: AdamW on the critic (9e-6), passes over a batch of rollouts (1).
        value_clip: PPO's clip of value changes (0.2); None for no clip.

    Raises:
        BadInputError: an unknown estimator, or a value out of range.
    """

    trace_columns: ClassVar[tuple[str, ...]] = ("token_reward", "dpo_reward", "kl_charge", "logp", "ref_logp")
    estimator: str = "gae"
    dpo_reward_scale: float = 0.05
    dpo_reward_clip: float | None = 0.05
    init_kl_coef: float = 0.01
    reward_scale: float = 1.0
    reward_clip: float | None = 10.0
    normalize_rewards: bool = False
    gamma: float = 1.0
    gae_lambda: float = 0.95
    critic_lr: float = 9e-6
    critic_epochs: int = 1
    value_clip: float | None = 0.2

    def __post_init__(self) -> None:
        if self.estimator not in ("gae", "group"):
            raise BadInputError(f"Unknown estimator {self.estimator!r}.", "Use gae or group.")
        if self.dpo_reward_clip is not None and self.dpo_reward_clip < 0:
            raise BadInputError(f"dpo_reward_clip must not be negative; got {self.dpo_reward_clip}.")
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name} lies in [0, 1]; got {getattr(self, name)}.")


@dataclass
class RTOConfig(RTOSettings, GRPOConfig):
    """GRPOConfig and RTOSettings in one; ``epsilon`` is PPO's clip, ``num_iterations`` its epochs over a batch of
    rollouts.

    ``loss_type="grpo"`` is the authors' code's: policy and value loss are means of the responses' means. With
    ``"bnpo"`` they are means of the batch's tokens, so that long responses count more; the other types change the
    policy's loss only. ``beta`` stays 0: the KL penalty is part of the reward.
    """

    loss_type: str = field(default="grpo", metadata={"help": "mean of the responses' means, as the authors' code"})
    beta: float = field(default=0.0, metadata={"help": "stays 0: the KL penalty is part of the reward"})

    def __post_init__(self) -> None:
        GRPOConfig.__post_init__(self)
        RTOSettings.__post_init__(self)
        if self.beta != 0:
            raise BadInputError(f"beta={self.beta} would charge the KL twice.", "Use init_kl_coef.")
        if self.loss_type == "vespo":
            raise BadInputError(f"RTO does not support loss_type='vespo': {ONE_ADVANTAGE}.")
        if self.estimator == "gae" and self.scale_rewards != "group":
            raise BadInputError(
                f"scale_rewards={self.scale_rewards!r} has no meaning with a critic: advantages are whitened.",
                'Use estimator="group", or leave scale_rewards out.',
            )


class RTOTrainer(RolloutTrainer):
    """Policy optimisation on token rewards; see the module's docstring.

    Args:
        dpo_model: pi_dpo, a frozen model trained with DPO; may be None if ``dpo_reward_scale`` is 0.
        ref_model: the reference of that training; default a copy of the policy as it starts (for PEFT, the policy
            without its adapter). Where only ``dpo_model`` is a ``PeftModel``, it is that model without its adapter: one
            model in memory for both.
        critic: for ``estimator="gae"``; default a copy of the policy's body with a new head.
        kwargs: as for ``trl.GRPOTrainer``.

    Raises:
        BadInputError: no DPO model though its reward is asked for, a GRPOConfig setting that has no meaning here, or
            data with a column of tools, which no rollout would see.
        TokenizerMismatchError: the DPO model reads another vocabulary.
        UnsupportedModelError: prompts with images, or a model whose logits are made in a way of its own.
        RewardError, NonFiniteLossError: while training; the offending batch is in ``output_dir/bad_batch.json``.
    """

    _tag_names = ["everytoken", "rto"]
    _name = "RTO"
    checkpoint_files: ClassVar[tuple[str, ...]] = ("rto.pt",)

    def __init__(
        self,
        model: PreTrainedModel,
        *positional: Any,
        dpo_model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        critic: Critic | None = None,
        **kwargs: Any,
    ):
        args = kwargs.get("args")
        if not isinstance(args, RTOConfig):
            raise BadInputError("RTOTrainer needs args=RTOConfig(...).")
        if isinstance(model, str):
            raise BadInputError("RTOTrainer takes a loaded model.", "Load it with everytoken.core.loading.load_model.")
        check_arguments("RTOTrainer", args, REFUSALS, model)
        if {"image", "images"} & check_columns("RTOTrainer", kwargs.get("train_dataset")):
            raise UnsupportedModelError("RTOTrainer scores text only, and these prompts have images.")
        head_module(model)
        if args.dpo_reward_scale and dpo_model is None:
            raise BadInputError(
                "RTO needs dpo_model: a model trained with DPO from this reference.",
                "Or dpo_reward_scale=0, which is PPO or GRPO.",
            )
        peft = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        # copies are made now: afterwards the policy's forward is patched, and a copy would share the patch
        self.dpo_model = dpo_model if args.dpo_reward_scale else None
        shared = peft or hasattr(self.dpo_model, "get_base_model")
        self.rto_reference = ref_model if ref_model is not None else None if shared else copy.deepcopy(model)
        self._holds_reference = not peft and shared and ref_model is None  # the DPO model does, under its adapter
        if self.dpo_model is not None:
            check_guide(model, self.dpo_model, "DPO model")
            start = self.rto_reference if self.rto_reference is not None else model
            shapes = [m.config.get_text_config().to_dict() for m in (start, self.dpo_model)]
            changed = [
                key
                for key in ("hidden_size", "num_hidden_layers", "model_type")
                if shapes[0].get(key) != shapes[1].get(key)
            ]
            if changed:
                warnings.warn(
                    f"The DPO model and the reference differ in {', '.join(changed)}: "
                    "unless the reference is what DPO training started from, their log-ratio is no reward.",
                    stacklevel=2,
                )
        made: Any = None
        if args.estimator == "gae":
            made = critic if critic is not None else Critic(model)
            if args.disable_dropout:
                disable_dropout_in_model(made)
        super().__init__(model, *positional, **kwargs)
        for scorer in (self.rto_reference, self.dpo_model):
            if scorer is not None:
                frozen(scorer, self.accelerator)
        self.critic: Any = None
        self._moments = [0.0, 0.0, 0.0]  # count, mean, sum of squared deviations of sequence rewards
        if made is not None:
            device = self.accelerator.device
            if in_shards():
                made = shard(made, self.accelerator)
            elif self.accelerator.num_processes > 1:
                made = torch.nn.parallel.DistributedDataParallel(
                    made.to(device), device_ids=None if device.type == "cpu" else [device]
                )
            self.critic = made.to(device)
            self.critic_optimizer = torch.optim.AdamW(made.parameters(), lr=args.critic_lr, weight_decay=0.0)

    # -- rollouts
    # --------------------------------------------------------------------------------------------------------
    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        mode = "train" if self.model.training else "eval"
        ids, attention, mask = rollouts_of(batch)
        length = mask.shape[1]
        # a row that no function scored counts as 0
        mine = self.own_rows(self._normalised(self.sequence_rewards().nan_to_num(0.0), mode), len(mask))

        old = batch.get("old_per_token_logps")
        if old is None:
            with torch.no_grad():
                old = self._get_per_token_logps_and_entropies(
                    self.model, ids, attention, length, batch_size=self.args.per_device_train_batch_size
                )[0]
        batch["old_per_token_logps"] = old
        reference = self._frozen_logps(None, ids, attention, length)
        guide = None if self.dpo_model is None else self._frozen_logps(self.dpo_model, ids, attention, length)
        args = self.args
        strengths = dict(
            dpo_reward_scale=args.dpo_reward_scale, dpo_reward_clip=args.dpo_reward_clip, kl_coef=args.init_kl_coef,
            reward_scale=args.reward_scale, reward_clip=args.reward_clip,
        )  # fmt: skip
        whole = token_rewards(old, reference, guide, mine, mask, **strengths)
        shaping = token_rewards(old, reference, guide, torch.zeros_like(mine), mask, **strengths)
        if args.estimator == "gae":
            batch["advantages"] = self._with_critic(whole, ids, attention, mask, mode)
        else:
            batch["advantages"] = self._by_group(shaping, (whole - shaping).sum(-1), mask, mode)
        counts = mask.sum(-1).clamp(min=1)
        self._log("rto/kl", masked_sum(old - reference, mask), mode)
        if guide is not None:
            self._log("rto/dpo_reward", masked_sum(args.dpo_reward_scale * (guide - reference), mask), mode)
        self._log("rto/token_reward", shaping.sum(-1) / counts, mode)
        return batch

    def _frozen_logps(
        self, model: PreTrainedModel | None, ids: torch.Tensor, attention: torch.Tensor, length: int
    ) -> torch.Tensor:
        """``[B, length]`` of the completions under a frozen model; None is the reference.

        By the very code that scores the policy, so that temperature, precision and head are the same.
        """
        scorer: Any = self.rto_reference if model is None else model
        scope: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if scorer is None:
            scorer = self.dpo_model if self._holds_reference else self.accelerator.unwrap_model(self.model)
            scope = reference_adapter(scorer)
        # the policy scores so already
        fused: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if scorer is not self.accelerator.unwrap_model(self.model):
            fused = fused_like(scorer, self.temperature)
        quiet = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), quiet, scope, fused:
            found: torch.Tensor = self._get_per_token_logps_and_entropies(
                scorer, ids, attention, length, batch_size=self.args.per_device_train_batch_size
            )[0]
        return found

    def _normalised(self, rewards: torch.Tensor, mode: str) -> torch.Tensor:
        if not self.args.normalize_rewards:
            return rewards
        if mode == "train":  # Welford's update by a batch; the same on every process, which all see all rewards
            count, mean, spread = self._moments
            new, fresh = len(rewards), rewards.double().mean().item()
            total, gap = count + new, fresh - mean
            squares = (rewards.double() - fresh).square().sum().item()
            self._moments = [total, mean + gap * new / total, spread + squares + gap * gap * count * new / total]
        count, mean, spread = self._moments
        return (rewards - mean) / max((spread / max(count, 1)) ** 0.5, 1e-4) if count else rewards

    def _by_group(self, shaping: torch.Tensor, ends: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
        """A group may be spread over processes: all of them see all rows, and each keeps its own."""
        size = self.num_generations if mode == "train" else self.num_generations_eval
        rows, length = mask.shape
        padded = self.accelerator.pad_across_processes(torch.stack([shaping, mask.float()], -1), dim=1)
        table, every = self.accelerator.gather(padded), self.accelerator.gather(ends)
        found = group_advantages(
            table[..., 0],
            every,
            table[..., 1].bool(),
            size,
            self.args.gamma,
            self.args.scale_rewards,
        )
        return self.own_rows(found, rows)[:, :length]

    # -- the critic
    # ------------------------------------------------------------------------------------------------------
    def _with_critic(
        self, rewards: torch.Tensor, ids: torch.Tensor, attention: torch.Tensor, mask: torch.Tensor, mode: str
    ) -> torch.Tensor:
        length, size = mask.shape[1], self.args.per_device_train_batch_size
        self.critic.eval()
        with torch.no_grad(), self.accelerator.autocast():
            values = torch.cat(
                [self.critic(ids[i : i + size], attention[i : i + size], length) for i in range(0, len(ids), size)]
            )
        advantages, returns = gae(rewards, values, mask, self.args.gamma, self.args.gae_lambda)
        self._log("rto/value_error", masked_mean((values - returns).square(), mask), mode)
        if mode == "train":
            self.critic.train()
            for _ in range(self.args.critic_epochs):
                for rows in torch.randperm(len(ids), device=ids.device).split(size):
                    with self.accelerator.autocast():
                        now = self.critic(ids[rows], attention[rows], length)
                    by_row = self.args.loss_type != "bnpo"
                    loss = value_loss(now, values[rows], returns[rows], mask[rows], self.args.value_clip, by_row)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(self.critic.parameters(), 1.0)
                    self.critic_optimizer.step()
                    self.critic_optimizer.zero_grad()
        return whiten(advantages, mask, lambda moments: self.accelerator.reduce(moments, reduction="sum"))

    # -- checkpoints
    # --------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        state: dict[str, Any] = {"moments": self._moments}
        if self.critic is not None:  # gathered from its shards by all processes
            critic = getattr(self.critic, "module", self.critic)
            state["critic"], state["optimizer"] = get_state_dict(critic, self.critic_optimizer, options=WHOLE)
        self._keep_state("rto.pt", state, trial)
        super()._save_checkpoint(model, trial)  # writes last what says that a checkpoint is whole

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            what = ", with the critic and the running moments of the rewards"
            state = self._kept_state(checkpoint, "rto.pt", what, "Go on from another checkpoint of RTO.")
            self._moments = state["moments"]
            if self.critic is not None and "critic" in state:
                set_state_dict(
                    getattr(self.critic, "module", self.critic), self.critic_optimizer,
                    model_state_dict=state["critic"], optim_state_dict=state["optimizer"], options=WHOLE,
                )  # fmt: skip
