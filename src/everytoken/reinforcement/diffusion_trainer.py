"""GRPO for masked diffusion models: the station's trainer, with rollouts of a canvas and likelihoods of any order.

Two hooks of TRL's GRPOTrainer are answered here, and its loss stays stock: ``_generate_single_turn`` calls the recipe's
sampler, and ``_get_per_token_logps_and_entropies`` asks the recipe's likelihood. What they need travels with the rows
of the batch: the canvas, the step that wrote each position, and one seed a row and inner iteration. So the policy, the
old one and the reference are asked the same, and the split into micro-batches changes nothing.

Where a recipe gives single steps credit, a row of the batch is a step of a rollout: the guess of that step, given the
canvas that it read. A micro-batch then has as many times more rows as there are steps to train.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..core.errors import BadInputError
from ..core.scoring import base_model
from ..decoding.canvas.model import CanvasModel, mask_token
from ..decoding.canvas.trajectory import Trajectory
from .base import Recipe, RolloutBatch
from .canvas_pieces import CanvasRows
from .diffusion_checks import check_canvas_recipe
from .rollouts import RewardError
from .trainer import RecipeTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = ("ids", "attention", "editable", "scored", "fix_step", "seeds")
"""What the batch holds of a canvas, each as ``canvas_NAME``."""


class _CanvasHooks(GRPOTrainer):
    """TRL's hooks, answered by a sampler and a likelihood. It stands between RecipeTrainer and GRPOTrainer."""

    recipe: Recipe
    mask_id: int
    eos_token_ids: list[Any]
    _found: Trajectory | None = None
    """The record of the batch of rollouts that is being made."""
    _width = 0
    """How many columns of a canvas stand in front of the completion; 0 where prompts are filled in."""
    _rows: CanvasRows | None = None
    """What is scored now; None while TRL scores rollouts whose canvases are not in the batch yet."""

    def _piece(self, kind: str) -> Any:
        return self.recipe.one(kind)

    # -- rollouts ------------------------------------------------------------------------------------------------------
    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        device = self.accelerator.device
        texts = [torch.tensor(ids, dtype=torch.long) for ids in prompt_ids]
        open_ = [bool((text == self.mask_id).any()) for text in texts]
        inside = all(open_)
        if any(open_) and not inside:
            raise BadInputError(
                "Some prompts have open positions and others have none.", "Fill in all prompts, or write behind all."
            )
        side = "right" if inside else "left"
        ids = pad_sequence(texts, True, self._tokenizer.pad_token_id, side).to(device)
        attention = pad_sequence([torch.ones_like(text) for text in texts], True, 0, side).bool().to(device)
        sampler = self._piece("canvas").sampler(
            self.temperature,
            tuple(self.eos_token_ids),
            self.mask_id,
            None if inside else self.max_completion_length,
            self.recipe.one("steps") is not None,
        )
        seeds = torch.randint(2**62, (len(ids),))  # a row is the same in any batch
        given = {"editable": (ids == self.mask_id) & attention} if inside else {}
        found: Trajectory = sampler(self._bare(self.model), ids, attention_mask=attention, seeds=seeds, **given)
        self._found, self._width = found, 0 if inside else ids.shape[1]
        self._metrics["train"]["recipe/forwards_a_rollout"].append(float(found.forwards))
        return self._completions(found.final_ids), None

    def _bare(self, model: Any) -> Any:
        """The network itself, whose forward says what it takes; adapters inside it stay."""
        return base_model(self.accelerator.unwrap_model(model))

    def _completions(self, ids: torch.Tensor) -> list[list[int]]:
        """What stands in the completion of each row, up to its first end token: what rewards see."""
        assert self._found is not None
        ended = torch.isin(ids, torch.tensor(self.eos_token_ids, dtype=torch.long, device=ids.device))
        ended &= self._found.editable
        shown = (self._found.attention & (ended.long().cumsum(1) - ended.long() == 0))[:, self._width :]
        return [row[keep].tolist() for row, keep in zip(ids[:, self._width :], shown, strict=True)]

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        self._rows = None
        batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        found = self._found
        assert found is not None
        scored = found.editable
        if not self._piece("canvas").score_after_end:
            ended = torch.isin(found.final_ids, found.final_ids.new_tensor(self.eos_token_ids)) & scored
            scored = scored & (ended.long().cumsum(1) - ended.long() == 0)
        # the whole canvas in place of the text that rewards saw
        batch["completion_ids"] = found.final_ids[:, self._width :]
        batch["completion_mask"] = found.attention[:, self._width :].long()
        batch["tool_mask"] = scored[:, self._width :].long()
        batch["num_items_in_batch"] = scored.sum()
        seeds = torch.randint(2**62, (len(scored), self.num_iterations), device=scored.device)
        values = (found.final_ids, found.attention, found.editable, scored, found.fix_step, seeds)
        return batch | {f"canvas_{name}": value for name, value in zip(RECORD, values, strict=True)}

    # -- likelihoods ---------------------------------------------------------------------------------------------------
    def _canvas_rows(self, batch: dict[str, Any], iteration: int = 0) -> CanvasRows:
        values: dict[str, Any] = {name: batch[f"canvas_{name}"] for name in RECORD}
        values["seeds"] = values["seeds"][:, iteration]
        assert self._found is not None
        return CanvasRows(**values, steps=self._found.steps, mask_id=self.mask_id)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """``[b, T]`` of the recipe's likelihood. In place of an entropy stands ``-log p`` of the drawn tokens, whose
        mean over draws it is.
        """
        if self._rows is None:
            nothing = torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device)
            return nothing, nothing if compute_entropy else None, None
        rows, likelihood = self._rows, self._piece("likelihood")
        size, found = batch_size or len(rows.ids), []
        for begin in range(0, len(rows.ids), size):
            with self.accelerator.autocast():
                part = likelihood(self._bare(model), rows.rows(slice(begin, begin + size)), self.temperature)
            found.append(part.per_position)
        logps = torch.cat(found)[:, -logits_to_keep:]
        return logps, -logps.detach() if compute_entropy else None, None

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        iteration = (self._step // self.args.steps_per_generation) % self.num_iterations
        self._rows = self._canvas_rows(inputs, iteration)
        for name in ("old", "ref"):
            if (values := inputs.get(f"canvas_{name}")) is not None:
                inputs[f"{name}_per_token_logps"] = values[:, min(iteration, values.shape[1] - 1)]
        try:
            loss: torch.Tensor = super()._compute_loss(model, inputs)
        finally:
            self._rows = None
        return loss


class DiffusionGRPOTrainer(RecipeTrainer, _CanvasHooks):
    """Policy optimisation of a masked diffusion model by a recipe of pieces.

    Args:
        model: a loaded model whose attention looks both ways.
        recipe: with a ``canvas`` and a ``likelihood`` (see ``canvas_pieces``), and other pieces.
        mask_id: the token of an open position; None takes the model's.
        kwargs: as for ``RecipeTrainer``. Prompts with open positions (mask tokens) are filled in. Dropout is off.

    Raises:
        BadInputError: no mask token, pieces that do not compose, or a setting that a canvas cannot honour. Before any
            text is written.
        UnsupportedModelError: a causal model.
        RewardError, NonFiniteLossError: while training; see ``RolloutTrainer``.
    """

    _tag_names = ["everytoken", "diffusion"]
    writes_canvases = True

    def __init__(
        self, model: PreTrainedModel, *positional: Any, recipe: Recipe, mask_id: int | None = None, **kwargs: Any
    ):
        if isinstance(model, str):
            raise BadInputError("DiffusionGRPOTrainer takes a loaded model.", "Load it: AutoModelForMaskedLM.")
        self.mask_id = mask_token(model, mask_id)
        if kwargs.get("args") is not None:
            check_canvas_recipe(recipe, kwargs["args"], kwargs)
            # the sampler writes without dropout: with it the policy that is scored would be another one
            kwargs["args"] = copy.copy(kwargs["args"])
            kwargs["args"].disable_dropout = True
        CanvasModel(base_model(model), self.mask_id).check()
        super().__init__(model, *positional, recipe=recipe, **kwargs)
        if None in self.eos_token_ids:  # TRL lists a tokenizer's end token even where it has none
            self.eos_token_ids = [token for token in self.eos_token_ids if token is not None]

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, *args: Any, **kwargs: Any) -> Any:
        self._scored_with = inputs, prompts, completions
        return super()._calculate_rewards(inputs, prompts, completions, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        batch["rollout"] = torch.arange(len(batch["advantages"]), device=batch["advantages"].device)
        if (piece := self.recipe.one("steps")) is not None:
            batch = self._by_steps(piece, batch)
        self._score_first(batch)
        return batch

    def _of_all(self, here: RolloutBatch) -> RolloutBatch:
        return here  # one process; the record of the canvas stays beside the rollouts

    def _batch_of(self, batch: dict[str, Any], *args: Any) -> RolloutBatch:
        found = super()._batch_of(batch, *args)
        found.canvas = self._canvas_rows(batch)
        return found

    # -- credit of steps -----------------------------------------------------------------------------------------------
    def _by_steps(self, piece: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with a row a rollout and trained step."""
        found = self._found
        assert found is not None and found.guesses is not None
        rewards = self._rewards_of_steps()
        groups = torch.arange(len(rewards), device=rewards.device) // self.num_generations
        choice = self._called(piece, rewards, groups)
        self._metrics["train"]["recipe/reward_of_a_guess"].append(rewards.mean().item())
        last = rewards[:, -1]
        lost = ((rewards.amax(1) > last) & (last < rewards.amax())).float().mean()
        self._metrics["train"]["recipe/right_before_the_end"].append(lost.item())
        steps = choice.steps or [found.steps - 1]  # without any signal one step of advantages 0 stays
        rows, index = len(rewards), torch.arange(len(rewards), device=rewards.device).repeat(len(steps))
        known = {
            name: value[index] if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,) else value
            for name, value in batch.items()
        }
        masked = torch.cat([(found.state(step) == found.mask_id) & batch["canvas_scored"] for step in steps])
        weights = torch.cat([piece.weights(found, step) for step in steps])
        guesses = torch.cat([found.guesses[:, step] for step in steps])
        advantages = choice.advantages[:, steps].T.reshape(-1, 1) * weights
        # a row that is full at a step has no prediction there: its advantages are 0, and something must be scored
        full = ~masked.any(1, keepdim=True)
        masked = torch.where(full, batch["canvas_scored"][index], masked)
        advantages = advantages.masked_fill(full, 0.0)
        here = slice(self._width, None)
        known |= {
            "completion_ids": guesses[:, here],
            "tool_mask": masked[:, here].long(),
            "num_items_in_batch": masked.sum(),
            "advantages": advantages[:, here],
            "canvas_ids": guesses,
            "canvas_scored": masked,
            "step": torch.tensor(steps, device=index.device).repeat_interleave(rows),
        }
        return known

    def _rewards_of_steps(self) -> torch.Tensor:
        """``[B, S]``; equal texts of a row are scored once, and the last step has the reward of the rollout."""
        found, (inputs, prompts, completions) = self._found, self._scored_with
        assert found is not None and found.guesses is not None
        last, own = self.sequence_rewards(), self._rewards
        asked: dict[tuple[int, tuple[int, ...]], int] = {}
        places = torch.empty(len(last), found.steps - 1, dtype=torch.long)
        for step in range(found.steps - 1):
            for row, ids in enumerate(self._completions(found.guesses[:, step])):
                places[row, step] = asked.setdefault((row, tuple(ids)), len(asked))
        rewards = last[:, None]
        if asked:
            rows = [row for row, _ in asked]
            texts = self.processing_class.batch_decode([list(ids) for _, ids in asked], skip_special_tokens=True)
            if isinstance(completions[0], list):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            ids_list = [list(ids) for _, ids in asked]
            super()._calculate_rewards([inputs[r] for r in rows], [prompts[r] for r in rows], texts, ids_list)
            rewards = torch.cat([self.sequence_rewards()[places.to(last.device)], rewards], 1)
            self._rewards = own  # the rollouts', for whoever asks
            self._pending_extra_logs.clear()  # of guesses, not of rollouts
            self._pending_metrics.clear()
        self._metrics["train"]["recipe/guesses_scored"].append(float(len(asked)))
        if bool(rewards.isnan().any()):
            raise RewardError("A reward function scored a rollout, or one of its guesses, with nothing (None).")
        return rewards

    # -- what rollouts are compared with -------------------------------------------------------------------------------
    @torch.no_grad()
    def _score_first(self, batch: dict[str, Any]) -> None:
        """Log-likelihoods of the policy that wrote the rollouts and of the reference, ``[B, I, T]``: one for each inner
        iteration where they depend on seeds.
        """
        wanted = [name for name in ("old", "ref") if batch.pop(f"{name}_per_token_logps", None) is not None]
        width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
        count = self.num_iterations if self._piece("likelihood").draws else 1
        for name in wanted:
            found = []
            for iteration in range(count):
                self._rows = self._canvas_rows(batch, iteration)
                with (
                    disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs),
                    self._reference() if name == "ref" else contextlib.nullcontext(self.model) as model,
                ):
                    ids = self._rows.ids
                    found.append(self._get_per_token_logps_and_entropies(model, ids, ids, width, size)[0])
            self._rows = None
            batch[f"canvas_{name}"] = torch.stack(found, 1)

    @contextlib.contextmanager
    def _reference(self) -> Any:
        if self.ref_model is not None:
            yield self.ref_model
            return
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            yield self.model
