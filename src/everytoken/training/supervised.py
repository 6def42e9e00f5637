"""Supervised tuning through the scored forward: TRL's SFTTrainer with a loss and a weight for every target token.

A subclass says in ``token_losses`` what each target token costs and weighs; here that is its cross-entropy and 1. A
row's loss is the mean of ``weight * loss`` over its target tokens, and a batch's the mean over rows
(``reduction="sequence"``) or over all target tokens (``"token"``, as TRL's own).
"""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer

from ..core.errors import BadInputError
from ..core.logprobs import masked_sum
from ..core.progress import Report, silent
from ..core.quiet import quiet_training
from .arguments import Refusals, check_arguments
from .checkpoints import ResumingMixin
from .datasets.messages import MessageTokenizer, prompts_as_messages
from .distributed import LaunchedMixin, in_shards
from .finite_check import stopped
from .quiet import ReportSteps, quiet_arguments, without_printer
from .scored_forward import add_scored_forward

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


WHOLE_ROWS = "the tokens of whole rows are weighted, and a row would mix with its neighbour"
REFUSALS: Refusals = {
    "packing": (False, WHOLE_ROWS),
    "eval_packing": (False, WHOLE_ROWS),
    "packing_strategy": ("bfd", WHOLE_ROWS),
    "padding_free": (False, WHOLE_ROWS),
    "loss_type": ("nll", "it has a loss of its own for every target token"),
}


class TargetLosses(NamedTuple):
    """What a batch ``[B, T]`` costs, token by token; position t - 1 belongs to the target at t.

    Attributes:
        losses: ``[B, T - 1]`` with gradient, 0 where ``mask`` is False.
        weights: ``[B, T - 1]``, 0 where ``mask`` is False.
        mask: ``[B, T - 1]`` bool, True on targets.
        predicted: ``[B, T]`` the model's own token at every target, the input's elsewhere.
        aux_loss: the load-balancing loss of a mixture of experts, or None.
    """

    losses: torch.Tensor
    weights: torch.Tensor
    mask: torch.Tensor
    predicted: torch.Tensor
    aux_loss: torch.Tensor | None = None


class SupervisedTrainer(ResumingMixin, LaunchedMixin, SFTTrainer):
    """Supervised tuning, whole rows at a time.

    Args:
        kwargs: as for ``trl.SFTTrainer``.

    Raises:
        BadInputError: packing or padding-free batches (a row would mix with its neighbour), or another loss.
        UnsupportedModelError: logits that the fused statistics do not follow (``core.scoring.output_head``).
        NonFiniteLossError: while training; the offending batch is in ``output_dir/bad_batch.json``.
    """

    reduction: str = "sequence"
    logs_accuracy: bool = False
    """Whether ``predicted`` holds the model's arg-max, so that its accuracy means something."""

    def __init__(self, *positional: Any, **kwargs: Any):
        args = kwargs.get("args", positional[1] if len(positional) > 1 else None)
        model = kwargs.get("model", positional[0] if positional else None)
        check_arguments(type(self).__name__, args, REFUSALS, model)
        unread = sorted(set(getattr(args, "dataset_kwargs", None) or ()) - {"skip_prepare_dataset"})
        if unread:
            raise BadInputError(
                f"{type(self).__name__} does not support dataset_kwargs with {', '.join(unread)}: TRL reads "
                "skip_prepare_dataset alone.",
                "Leave them out.",
            )
        if kwargs.get("compute_loss_func") is not None:
            raise BadInputError(f"{type(self).__name__} does not support compute_loss_func: it has a loss of its own.")
        super().__init__(*positional, **kwargs)
        add_scored_forward(self.accelerator.unwrap_model(self.model))

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        """TRL's preparation, for messages as users have them: without content, with content as parts, or beside a text
        prompt.
        """
        if "input_ids" not in (getattr(dataset, "column_names", None) or ()):
            dataset = prompts_as_messages(dataset)
            if isinstance(processing_class, PreTrainedTokenizerBase):
                processing_class = MessageTokenizer(processing_class)
        return super()._prepare_dataset(dataset, processing_class, *args, **kwargs)

    def token_losses(self, model: torch.nn.Module, inputs: dict[str, Any]) -> TargetLosses:
        """The cross-entropy of every target, each with weight 1."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = labels[:, 1:] != -100
        score = {"mask": mask, "labels": labels[:, 1:][mask], "needs": (), "aux_loss": self.aux_loss_enabled}
        stats = model(input_ids=ids, **read_with(inputs), score=score)
        losses = on_targets(-stats.logps, mask)
        return TargetLosses(losses, mask.to(losses.dtype), mask, ids, stats.aux_loss)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        found = self.token_losses(model, inputs)
        weighted = masked_sum(found.weights * found.losses, found.mask)
        count = found.mask.sum(-1)
        if self.reduction == "token":
            loss = weighted.sum() / (
                count.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
            ).clamp(min=1)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes
        else:
            rows = (count > 0).sum().clamp(min=1)  # rows without targets teach nothing
            loss = (weighted / count.clamp(min=1)).sum() / rows
            if num_items_in_batch is not None:  # Trainer leaves accumulation to losses that take it
                loss = loss / self.current_gradient_accumulation_steps
        if found.aux_loss is not None:
            steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
            loss = loss + self.router_aux_loss_coef * found.aux_loss / steps
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(found.aux_loss.detach()).mean().item())
        if not torch.isfinite(loss):
            texts = self.processing_class.batch_decode(inputs["input_ids"])
            batch = zip(texts, inputs["labels"].tolist(), weighted.detach().tolist(), strict=True)
            raise stopped(self, loss.item(), [{"text": t, "labels": y, "loss": value} for t, y, value in batch])
        self._log_tokens(found, inputs)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        return loss

    def _log_tokens(self, found: TargetLosses, inputs: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        mask = found.mask
        right = (found.predicted[:, 1:] == inputs["input_ids"][:, 1:]) & mask
        largest = found.weights.detach().amax(-1).sum()
        sums = torch.stack([found.losses.detach().sum(), right.sum().float(), largest, mask.sum().float()])
        total = self.accelerator.reduce(sums, reduction="sum")
        self._metrics[mode]["nll"].append((total[0] / total[3].clamp(min=1)).item())
        if self.logs_accuracy:
            self._metrics[mode]["mean_token_accuracy"].append((total[1] / total[3].clamp(min=1)).item())
        rows = mask.shape[0] * self.accelerator.num_processes
        self._metrics[mode]["weights/largest"].append((total[2] / rows).item())
        if mode == "train":
            self._total_train_tokens += self.accelerator.reduce(inputs["attention_mask"].sum(), reduction="sum").item()
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def read_with(inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The mask and positions that a batch's ids are read with."""
    return {name: inputs[name] for name in ("attention_mask", "position_ids") if inputs.get(name) is not None}


def on_targets(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``[N]`` values laid out on the True places of ``mask``; 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


@quiet_training()
def tune_copy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[dict[str, list[int]]],
    *,
    steps: int,
    lr: float,
    lora_r: int = 0,
    batch_size: int = 4,
    seed: int = 0,
    bf16: bool = False,
    report: Report = silent,
    stage: str = "tuning",
) -> Any:
    """Tunes a model on tokenized rows (``input_ids``, ``labels``) and returns it frozen.

    Args:
        model: a copy of one's own: it is changed.
        lora_r: rank of an adapter on the MLP's layers, merged at the end (in shards it stays beside the weights); 0
            tunes all weights.
    """
    from datasets import Dataset
    from trl import SFTConfig

    adapter = None
    if lora_r:
        from peft import LoraConfig

        names = ["gate_proj", "up_proj", "down_proj"]
        present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        wanted = names if set(names) <= present else "all-linear"
        adapter = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules=wanted)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            **quiet_arguments(
                folder,
                bf16=bf16,
                per_device_train_batch_size=batch_size,
                max_steps=steps,
                learning_rate=lr,
                seed=seed,
                max_length=None,
            )
        )
        trainer = SupervisedTrainer(
            model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=[ReportSteps(report, stage)],
        )
        without_printer(trainer).train()
        merged = adapter is not None and not in_shards()
        made = trainer.model.merge_and_unload() if merged else trainer.model
    return made.requires_grad_(False).eval()
