"""One trainer for every recipe: TRL's GRPOTrainer with pieces at the places where it lets a subclass decide.

Only small methods are overridden and none is copied, so a recipe without pieces, or with pieces that change nothing,
trains the weights of stock GRPO to the last bit. Pieces act while training; evaluation is TRL's own, with the recipe's
prompts and rewards.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, disable_dropout_in_model

from ..core.errors import BadInputError
from ..core.logprobs import masked_mean
from ..core.scoring import base_model, head_module, output_head
from ..training.arguments import check_arguments
from ..training.distributed import frozen
from .base import Recipe, RolloutBatch, UpdateBatch
from .recipe_checks import BATCH_KINDS, REFUSALS, check_recipe, limited
from .rollouts import Rollouts, RolloutTrainer, Watch, Writer, Written, rollouts_of
from .stages import decide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOTALS = ("bnpo", "dapo", "cispo")
"""Losses in which a row without tokens adds nothing to numerator or divisor."""


class RecipeTrainer(RolloutTrainer):
    """Policy optimisation by a recipe of pieces.

    Args:
        model: a loaded model.
        recipe: what differs from GRPO.
        reward_funcs: as for ``trl.GRPOTrainer``; may be left out where the recipe has rewards.
        kwargs: as for ``trl.GRPOTrainer``.

    Raises:
        BadInputError: a setting of GRPOConfig that the recipe's pieces could not honour, or no reward.
        UnsupportedModelError: pieces that need distributions with images or weights in shards.
        RewardError, NonFiniteLossError: while training; see ``RolloutTrainer``.
    """

    _tag_names = ["everytoken", "recipe"]
    checkpoint_files: ClassVar[tuple[str, ...]] = ("recipe.pt",)
    writes_canvases: ClassVar[bool] = False
    epsilon_low: Any  # TRL's numbers, or a piece's tensors while a loss is computed
    epsilon_high: Any

    def __init__(
        self, model: PreTrainedModel, *positional: Any, recipe: Recipe, reward_funcs: Any = None, **kwargs: Any
    ):
        if isinstance(model, str):
            raise BadInputError("RecipeTrainer takes a loaded model.", "Load it: everytoken.load_model.")
        args = kwargs.get("args")
        if args is None:
            raise BadInputError("RecipeTrainer needs args=GRPOConfig(...).")
        check_arguments("RecipeTrainer", args, REFUSALS, model)
        check_recipe(recipe, args, kwargs.get("train_dataset"), kwargs, self.writes_canvases)
        if "distributions" in recipe.needs:
            head_module(model)
        for piece in recipe.pieces:
            if hasattr(piece, "check_model"):
                piece.check_model(model)
        given = [] if reward_funcs is None else list(reward_funcs) if isinstance(reward_funcs, list) else [reward_funcs]
        if own := recipe.of("reward"):
            kwargs["args"] = args = copy.copy(args)  # the user's stays as it is
            weights = args.reward_weights if args.reward_weights is not None else [1.0] * len(given)
            args.reward_weights = [*weights, *(float(getattr(piece, "weight", 1.0)) for piece in own)]
        if not given + own:
            raise BadInputError("Nothing rewards the rollouts.", "Give reward_funcs.")
        self.recipe = recipe
        self._update: dict[str, Any] | None = None
        self._written: Written | None = None
        self._watch: Watch | None = None
        self._scored: list[Any] | None = None  # log-probabilities and entropies of rollouts that TRL scores
        self._observing = [piece for piece in recipe.pieces if hasattr(piece, "observe")]
        peft = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        beta, reference = args.beta, None
        if beta != 0 and not peft:  # TRL would load the reference by a name, which a model in memory need not have
            reference = copy.deepcopy(model)
            kwargs["args"] = args = copy.copy(args)
            args.beta = 0.0
        super().__init__(model, *positional, reward_funcs=given + own, **kwargs)
        if reference is not None:
            if args.disable_dropout:
                disable_dropout_in_model(reference)
            add_fused_lm_head(reference, self.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32)
            self.ref_model, self.beta, self.args.beta = frozen(reference, self.accelerator), beta, beta
        for piece in recipe.pieces:
            if hasattr(piece, "use_tokenizer"):
                piece.use_tokenizer(self._tokenizer)
        if recipe.one("sampler") is not None and self.args.max_steps <= 0:  # an order is one of the whole training
            self.args = copy.copy(self.args)
            rows = len(self.train_dataset) * self.num_generations // self.args.generation_batch_size
            updates = rows * self._repeats // self.args.gradient_accumulation_steps
            self.args.max_steps = max(1, math.ceil(updates * self.args.num_train_epochs))
        if (aggregation := recipe.one("aggregation")) is not None:
            self.loss_type = aggregation.loss_type

    # -- while rollouts are made
    # ------------------------------------------------------------------------------------------
    @property
    def _progress(self) -> tuple[int, int]:
        return self.state.global_step, max(1, self.state.max_steps)

    @property
    def _repeats(self) -> int:
        """How many micro-batches a batch of rollouts is used for."""
        return int(self.num_iterations * self.args.steps_per_generation)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        piece = self.recipe.one("sampler")
        if piece is None:
            return super()._get_train_sampler(dataset)
        repeats = dict(
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self._repeats,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )
        batches = math.ceil(self.args.max_steps * self.args.gradient_accumulation_steps / self._repeats)
        return piece(self.train_dataset if dataset is None else dataset, repeats, batches)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if self._written is not None:
            return self._written.completions, None
        limits = [piece.max_new_tokens(*self._progress) for piece in limited(self.recipe)]
        if not limits:
            return self._generate_with_temperature(*args, **kwargs)
        return self._generate_at_most(min(limits), *args, **kwargs)

    def _generate_at_most(self, limit: int, *args: Any, **kwargs: Any) -> Any:
        whole = self.generation_config.max_new_tokens
        self.generation_config.max_new_tokens = min(whole, limit)
        try:
            return self._generate_with_temperature(*args, **kwargs)
        finally:
            self.generation_config.max_new_tokens = whole

    def _generate_with_temperature(self, *args: Any, **kwargs: Any) -> Any:
        piece = self.recipe.one("temperature")
        if piece is None or not self.model.training:
            return super()._generate_single_turn(*args, **kwargs)
        model: Any = base_model(self.accelerator.unwrap_model(self.model))
        stock = model._get_logits_processor

        def with_temperature(*args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([piece.processor(), *stock(*args, **kwargs)])

        model._get_logits_processor = with_temperature
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            del model._get_logits_processor

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        inputs = [self._prompted(row) for row in inputs]
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)  # type: ignore[no-any-return]
        if (rollout := self.recipe.one("rollout")) is not None:
            self._written = self._called(rollout, inputs, self._writer())
            inputs = self._written.rows
        self._scored = [] if self.recipe.needs & {"logps", "entropies"} else None
        try:
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if self._written is not None and self._written.logps is not None:
                batch["old_per_token_logps"] = pad_sequence(
                    [torch.tensor(row, device=batch["completion_ids"].device) for row in self._written.logps], True
                )
        finally:
            self._written, scored, self._scored = None, self._scored or [], None
        # the very scores that TRL keeps as those of the old policy: they need not be made again
        known = next((pair for pair in scored if pair[0] is batch.get("old_per_token_logps")), None)
        if carrying := [piece for piece in self.recipe.pieces if hasattr(piece, "carry")]:
            every = gather_object(inputs) if self.accelerator.num_processes > 1 else inputs
            first = self.accelerator.process_index * len(inputs)
            for piece in carrying:
                carried = piece.carry(every, slice(first, first + len(inputs)))
                batch |= {name: value.to(self.accelerator.device) for name, value in carried.items()}
        if self.recipe.of(*BATCH_KINDS) or self._observing:
            self._decide(batch, known)
        return batch

    def _prompted(self, row: dict[str, Any]) -> dict[str, Any]:
        row = dict(row)  # copies share a row
        for piece in self.recipe.of("prompt"):
            row = piece(row, *self._progress)
        return row

    def _writer(self) -> Writer:
        def write(texts: list[list[int]], limit: int) -> list[list[int]]:
            found: list[list[int]] = self._generate_at_most(limit, texts, None, {}, self.num_generations)[0]
            return found

        @torch.no_grad()
        def score(prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
            pad = self._tokenizer.pad_token_id
            device = self.accelerator.device
            before = pad_sequence([torch.tensor(ids) for ids in prompts], True, pad, "left")
            shown = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in prompts], True, 0, "left")
            behind = pad_sequence([torch.tensor(ids) for ids in completions], True, pad)
            written = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in completions], True)
            ids, mask = torch.cat([before, behind], 1).to(device), torch.cat([shown, written], 1).to(device)
            size = self.args.per_device_train_batch_size
            with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                logps = self._get_per_token_logps_and_entropies(
                    self.model, ids, mask, behind.shape[1], batch_size=size
                )[0]
            return [row[: len(ids)].tolist() for row, ids in zip(logps, completions, strict=True)]

        data = self.train_dataset
        return Writer(
            tokenize=lambda rows: self._tokenize_prompts([row["prompt"] for row in rows])[0],
            write=write,
            score=score,
            count=len(data),
            data=lambda index: self._prompted(data[index]),
            limit=self.max_completion_length,
            group=self.num_generations,
            ends=frozenset(self.eos_token_ids),
            step=self.state.global_step,
        )

    # -- once a batch
    # -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _decide(self, batch: dict[str, Any], known: Any = None) -> None:
        """Puts advantages of every token, and what is selected, into TRL's batch."""
        rollouts, recipe = rollouts_of(batch), self.recipe
        rows = len(rollouts.mask)
        here = self._batch_of(batch, rollouts, known)
        every = self._of_all(here)
        for piece in self._observing:
            piece.observe(every)
        if not recipe.of(*BATCH_KINDS):
            return
        group = recipe.one("group_advantage")
        found = self.accelerator.gather(batch["advantages"]) if group is None else self._called(group, every)

        def weigh(piece: Any, advantages: torch.Tensor) -> torch.Tensor:
            if "distributions" not in getattr(piece, "needs", ()):
                return self._called(piece, every, advantages)  # type: ignore[no-any-return]
            mine = self.own_rows(advantages, rows)[:, : rollouts.length]
            return self._gathered(self._called(piece, here, mine))

        advantages, kept, weights = decide(recipe, every, found, self._called, weigh)
        if self._watch is not None:
            self._watch.batch = every
            self._watch.columns |= {"weight": weights, "kept": kept}
        if recipe.of("rollouts", "tokens"):
            share = kept.sum() / every.mask.sum().clamp(min=1)
            self._metrics["train"]["recipe/tokens_trained"].append(share.item())
            if recipe.divisor == "all":
                advantages = advantages * kept
            else:
                mine = self.own_rows(kept, rows)[:, : rollouts.length]
                batch["tool_mask"] = mine.to(batch["completion_mask"].dtype)
                batch["num_items_in_batch"] = kept.sum()
        batch["advantages"] = self.own_rows(advantages, rows)[:, : rollouts.length]
        logged = masked_mean(advantages, every.mask)  # TRL logged its own
        for index in range(min(len(logged), len(self._logs["advantages"]))):
            self._logs["advantages"][-1 - index] = logged[-1 - index].item()

    def _truncated(self, batch: dict[str, Any]) -> torch.Tensor:
        ids, lengths = batch["completion_ids"], batch["completion_mask"].sum(1)
        last = ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
        return ~torch.isin(last, torch.tensor(self.eos_token_ids, device=ids.device)) | (lengths == 0)

    def _batch_of(self, batch: dict[str, Any], rollouts: Rollouts, known: Any = None) -> RolloutBatch:
        rows, step = len(rollouts.mask), self._progress
        rewards = self.sequence_rewards()
        groups = torch.arange(len(rewards), device=rewards.device) // self.num_generations
        found = RolloutBatch(
            batch["completion_ids"],
            rollouts.mask,
            self.own_rows(groups, rows),
            self.own_rows(rewards, rows),
            *step,
            truncated=self._truncated(batch),
        )
        if self.recipe.needs & {"logps", "entropies"}:
            if known is None:
                with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
                    known = self._get_per_token_logps_and_entropies(
                        self.model,
                        rollouts.ids,
                        rollouts.attention,
                        rollouts.length,
                        batch_size=self.args.per_device_train_batch_size,
                        compute_entropy=True,
                    )
            found.logps, found.entropies = known[:2]
            entropy = masked_mean(found.entropies, rollouts.mask, dim=None)
            self._log("recipe/rollout_entropy", entropy, "train")
        if "distributions" in self.recipe.needs:
            found.distributions = lambda chosen: self._distributions(rollouts, chosen)
        return found

    def _distributions(self, rollouts: Rollouts, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[n, T, D]`` and logits ``[n, T, V]`` of some rows, in float32."""
        model = base_model(self.accelerator.unwrap_model(self.model))
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            with self.accelerator.autocast():
                hidden = model.base_model(
                    input_ids=rollouts.ids[rows], attention_mask=rollouts.attention[rows], use_cache=False
                ).last_hidden_state
        hidden = hidden[:, -rollouts.length - 1 : -1]
        logits = output_head(model).detached().logits(hidden.flatten(0, 1)) / self.temperature
        return hidden.float(), logits.unflatten(0, hidden.shape[:2])

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """Rows of all processes, padded to one length."""
        if self.accelerator.num_processes == 1:
            return values
        if values.dim() > 1:
            values = self.accelerator.pad_across_processes(values.contiguous(), dim=1)
        found: torch.Tensor = self.accelerator.gather(values.contiguous())
        return found

    def _of_all(self, here: RolloutBatch) -> RolloutBatch:
        logps, entropies = (None if item is None else self._gathered(item) for item in (here.logps, here.entropies))
        assert here.truncated is not None
        given = (here.ids, here.mask.int(), here.groups, here.rewards, here.truncated.int())
        ids, mask, groups, rewards, truncated = (self._gathered(value) for value in given)
        return RolloutBatch(
            ids, mask.bool(), groups, rewards, here.step, here.steps, logps, entropies, truncated=truncated.bool()
        )

    def _called(self, piece: Any, *arguments: Any) -> Any:
        found = piece(*arguments)
        for name, value in getattr(piece, "metrics", {}).items():
            self._metrics["train"][f"recipe/{name}"].append(float(value))
        return found

    # -- in every update -----------------------------------------------------------------------------------------------
    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if not self.model.training:
            return super()._compute_loss(model, inputs)
        every, inputs = inputs, self._without_empty_rows(inputs)
        bounds: tuple[Any, Any] = self.epsilon_low, self.epsilon_high
        # the advantages of this copy are read after the forward, in which ratio weights change them
        observing = self._watch is not None or self.recipe.of("clip", "ratio_weight")
        self._update = dict(inputs) if observing else None
        try:
            loss = super()._compute_loss(model, inputs if self._update is None else self._update)
        finally:
            self._update = None
            self.epsilon_low, self.epsilon_high = bounds
        for piece in self.recipe.of("auxiliary"):
            loss = loss + piece(model, every, *self._progress) / self.current_gradient_accumulation_steps
        return loss

    def _without_empty_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Rows of which nothing is trained on need no forward, where they do not count in the loss either.

        Processes must gather equal numbers of rows, so with several of them all rows stay.
        """
        chosen = self.recipe.of("rollouts", "tokens") and self.recipe.divisor == "kept"
        whole = self._watch is not None or self.accelerator.num_processes > 1
        if not chosen or self.loss_type not in TOTALS or whole:
            return inputs
        full = (inputs["completion_mask"] * inputs["tool_mask"]).any(1)
        rows = full.nonzero()[:, 0]
        if len(rows) == len(full):
            return inputs
        rows = rows if len(rows) else rows.new_zeros(1)

        def of_rows(value: Any) -> Any:
            return value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == full.shape else value

        return {name: of_rows(value) for name, value in inputs.items()}

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if keeping := self._scored is not None and model is self.model:
            kwargs["compute_entropy"] = True
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if keeping:
            assert self._scored is not None
            self._scored.append(found[:2])
        if self._update is not None:
            self._observe(found[0].detach(), found[1].detach())
        return found

    def _observe(self, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        """Clip bounds and ratio weights of this update, between its forward and its loss."""
        inputs = self._update
        assert inputs is not None
        mask, advantages = rollouts_of(inputs).mask, inputs["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logps)
        ratio = torch.exp(logps - inputs.get("old_per_token_logps", logps))
        update = UpdateBatch(ratio, logps, entropies, mask, advantages)
        low, high = (torch.full_like(logps, bound) for bound in (self.epsilon_low, self.epsilon_high))
        if (clip := self.recipe.one("clip")) is not None:
            low, high = clip(update, low, high)
            self.epsilon_low, self.epsilon_high = low, high
        weights = torch.ones_like(logps)
        for piece in self.recipe.of("ratio_weight"):
            weights = weights * self._called(piece, update, low, high)
            inputs["advantages"] = advantages * weights
        if self._watch is not None:
            self._watch.columns |= {"entropy": entropies, "low": low, "high": high, "ratio_weight": weights}

    # -- checkpoints
    # ------------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        self._keep_state("recipe.pt", self.recipe.state_dict(), trial)
        super()._save_checkpoint(model, trial)  # writes last what says that a checkpoint is whole

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = self._kept_state(checkpoint, "recipe.pt", "", "Go on from a checkpoint of a recipe.")
            self.recipe.load_state_dict(state)
