"""One trainer for every preference loss: a subclass of TRL's DPOTrainer.

TRL keeps what it does well: data preparation, padding, distribution, PEFT, checkpoints. This subclass replaces the
loss: it takes the last hidden states of policy and reference at the response positions only, computes per-token
log-probabilities and whatever else the loss ``needs`` in one chunked pass (``core.logprobs.token_stats``), and hands
them to a ``PreferenceLoss``. The ``[B, T, V]`` logits never exist, neither the policy's nor the reference's::

    rows = dict(train_dataset=pairs, processing_class=tokenizer)
    trainer = PreferenceTrainer(model, loss=TDPOLoss(alpha=0.5), args=DPOConfig(...), **rows)
    trainer = PreferenceTrainer(model, loss=TGDPOLoss(), annotators=[ModelLogps(guide)], args=DPOConfig(...), **rows)

A loss that takes data columns (a guide's log-probabilities, a criticality) finds them in the dataset, or an annotator
computes them once, before training. With ``precompute_ref_log_probs=True`` the reference becomes such a column too, and
is not held in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from ..core.errors import BadInputError
from ..core.logprobs import OutputHead, TokenStats
from ..core.progress import Report, silent
from ..core.scoring import check_guide, output_head
from ..training.arguments import Refusals, check_arguments
from ..training.checkpoints import ResumingMixin
from ..training.datasets.messages import MessageTokenizer, prompts_as_messages
from ..training.datasets.pairs import check_rows, without_identical
from ..training.distributed import LaunchedMixin, frozen, in_shards
from ..training.finite_check import NonFiniteLossError, stopped
from ..training.precision import mixed_precision
from ..training.scored_forward import add_scored_forward, reference_adapter
from .base import PairScores, PreferenceLoss, PreferenceOutput, TokenAnnotator, declared
from .collator import SIDES, ColumnCollator
from .columns import ModelLogps, check_columns, missing_columns, precompute
from .dpo import DPOLoss

if TYPE_CHECKING:
    from datasets import Dataset

OWN_LOSSES = "it belongs to TRL's own losses; here the loss is an argument, loss=..."
REFUSALS: Refusals = {
    "padding_free": (False, "TRL's preference trainer has none at present, and pairs are scored as padded rows"),
    "loss_type": (["sigmoid"], OWN_LOSSES),
    "loss_weights": (None, OWN_LOSSES),
    "f_divergence_type": ("reverse_kl", OWN_LOSSES),
    "f_alpha_divergence_coef": (0.5, OWN_LOSSES),
    "label_smoothing": (0.0, OWN_LOSSES),
    "discopop_tau": (0.05, OWN_LOSSES),
    "use_weighting": (False, OWN_LOSSES),
    "ld_alpha": (None, OWN_LOSSES),
    "reference_free": (False, "these losses compare with a reference, and without one they are undefined"),
    "bf16_full_eval": (False, "it would round the policy and not the reference"),
    "fp16_full_eval": (False, "it would round the policy and not the reference"),
}
"""What TRL's own losses read, and what would set policy and reference apart."""


class PreferenceTrainer(ResumingMixin, LaunchedMixin, DPOTrainer):
    """TRL's DPOTrainer with a pluggable per-token loss.

    Args:
        loss: a PreferenceLoss; default DPO with ``args.beta``.
        annotators: compute the loss's data columns where the dataset lacks them. A function of the tokenized training
            rows that returns annotators is called once, and only if columns are missing: it may train guides first.
        monitor_kl: also log ``kl/chosen`` and ``kl/rejected`` (forward KL a response, nats) for losses that do not need
            it.
        drop_identical: leave out pairs whose responses are the same text or the same tokens, which teach nothing, and
            count them in ``dropped``; otherwise the first one is refused.
        report: called with ``(stage, done, total)`` while columns are computed.
        kwargs: as for ``trl.DPOTrainer`` (``model``, ``ref_model``, ``args``, ``train_dataset``, ``peft_config``, ...).

    Raises:
        BadInputError: a DPOConfig setting that has no meaning here, ``args.beta`` beside a loss with another one, no
            ``ref_model`` for a model made in memory, a missing column, or a bad row (identical or empty responses),
            which it names.
        TokenizerMismatchError: reference or guide read another vocabulary.
        NonFiniteLossError: while training; the offending batch is in ``output_dir/bad_batch.json``.
    """

    _tag_names = ["everytoken", "preference"]
    _name = "everytoken preference"
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *positional: Any,
        loss: PreferenceLoss | None = None,
        annotators: Sequence[TokenAnnotator] | Callable[[Dataset], Sequence[TokenAnnotator]] = (),
        monitor_kl: bool = False,
        drop_identical: bool = False,
        report: Report | None = None,
        **kwargs: Any,
    ):
        args: DPOConfig | None = kwargs.get("args")
        if args is None and len(positional) > 2:
            args = positional[2]
        policy = kwargs.get("model", positional[0] if positional else None)
        reference = kwargs.get("ref_model", positional[1] if len(positional) > 1 else None)
        check_arguments("PreferenceTrainer", args, REFUSALS, policy)
        if reference is None and kwargs.get("peft_config") is None:
            _check_can_be_reloaded(policy, args)
        if loss is None:
            loss = DPOLoss(beta=args.beta if args is not None else 0.1)
        elif args is not None and args.beta not in (DPOConfig.beta, getattr(loss, "beta", DPOConfig.beta)):
            raise BadInputError(
                f"args.beta={args.beta} stands beside loss={loss!r}, which has its own settings.",
                f"Give it to the loss: {type(loss).__name__}(beta={args.beta}).",
            )
        self.preference_loss = loss
        inputs = declared(loss)
        self.data_columns = tuple(sorted(inputs.data_columns))
        self.annotators: list[TokenAnnotator] = []
        self._make_annotators = annotators if callable(annotators) else None
        self._report = report or silent
        self.drop_identical = drop_identical
        self.dropped: dict[str, int] = {}
        self.monitor_kl = monitor_kl
        self.needs = inputs.needs | ({"forward_kl"} if monitor_kl else set())
        if args is not None and args.precompute_ref_log_probs and self.needs:
            raise BadInputError(
                "precompute_ref_log_probs keeps one number a token, but this training needs "
                f"{', '.join(sorted(self.needs))}.",
                "Leave it off, so that the reference's distributions are there.",
            )
        self._policy = policy if hasattr(policy, "get_output_embeddings") else None
        self._given_reference = reference if hasattr(reference, "get_output_embeddings") else None
        if self._policy is not None and self._given_reference is not None:
            check_guide(policy, reference, "reference")
        if not callable(annotators):
            self._take_annotators(annotators)
        super().__init__(*positional, **kwargs)
        self.data_collator = ColumnCollator(self.data_collator, (*self.data_columns, "ref_logps"))
        for model in (self.model, self.ref_model):
            if model is not None:
                add_scored_forward(self.accelerator.unwrap_model(model))

    def create_accelerator_and_postprocess(self) -> None:
        """Shards the reference as the policy, layer by layer (TRL would gather all of its weights at every forward)."""
        super().create_accelerator_and_postprocess()
        # with precomputed log-probabilities TRL hashes whole weights first, and shards them itself
        if self._given_reference is not None and in_shards() and not self.args.precompute_ref_log_probs:
            frozen(self._given_reference, self.accelerator)

    def _take_annotators(self, annotators: Sequence[TokenAnnotator]) -> None:
        """Keeps them; a guide with another vocabulary is refused."""
        self.annotators = list(annotators)
        for item in self.annotators:
            for model in getattr(item, "__dict__", {}).values():
                if self._policy is not None and hasattr(model, "get_output_embeddings"):
                    check_guide(self._policy, model, f"guide for {item.column}")

    # -- data
    # ------------------------------------------------------------------------------------------------------------
    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's preparation (skipped for rows that are tokenized), checks of every row, and the columns that the loss
        takes.
        """
        sized = hasattr(dataset, "__len__")
        names = set(getattr(dataset, "column_names", None) or [])
        label = f"{dataset_name} data"
        if "chosen_ids" not in names:
            if sized and {"prompt", "chosen", "rejected"} <= names:
                self._check(dataset, ("prompt", "chosen", "rejected"), label)
                dataset = self._without_identical(prompts_as_messages(dataset, label), ("chosen", "rejected"), label)
            text_only = isinstance(processing_class, PreTrainedTokenizerBase)
            reader = MessageTokenizer(processing_class) if text_only else processing_class
            dataset = super()._prepare_dataset(dataset, reader, args, dataset_name)
        if sized:
            self._check(dataset, ("prompt_ids", "chosen_ids", "rejected_ids"), label)
            dataset = self._without_identical(dataset, ("chosen_ids", "rejected_ids"), label)
        if self.data_columns:
            if self._make_annotators is not None and missing_columns(dataset, self.data_columns):
                make, self._make_annotators = self._make_annotators, None
                self._take_annotators(make(dataset))
            wanted = [item for item in self.annotators if item.column in self.data_columns]
            with mixed_precision(args):  # as the policy will run
                dataset = precompute(dataset, wanted, self._report, self._kept_end(args))
            check_columns(dataset, self.data_columns)
        return dataset

    def _check(self, dataset: Dataset, names: tuple[str, ...], label: str) -> None:
        columns = [dataset[name] for name in names]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        check_rows(rows, label, identical=self.drop_identical)

    def _without_identical(self, dataset: Dataset, names: tuple[str, str], label: str) -> Dataset:
        if not self.drop_identical:
            return dataset
        kept = without_identical(dataset, names, label)
        self.dropped[label] = self.dropped.get(label, 0) + len(dataset) - len(kept)
        return kept

    @staticmethod
    def _kept_end(args: DPOConfig) -> int | None:
        """How many tokens at the end of a row the policy reads, where rows lose their beginning."""
        return args.max_length if args.truncation_mode == "keep_end" else None

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [f"{side}_{name}" for name in (*self.data_columns, "ref_logps") for side in SIDES]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra]))

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Any:
        """The reference's log-probabilities per token, as columns ``chosen_ref_logps`` and ``rejected_ref_logps``."""
        model = self.ref_model if self.ref_model is not None else self.accelerator.unwrap_model(self.model)
        model.to(self.accelerator.device)
        add_scored_forward(model)
        peft = self.ref_model is None and hasattr(model, "peft_config")
        scope = reference_adapter(model) if peft else contextlib.nullcontext()
        training = model.training
        model.eval()
        wanted = [ModelLogps(model, "ref_logps", batch_size)]
        with scope, self.accelerator.autocast():
            dataset = precompute(dataset, wanted, self._report, self._kept_end(self.args))
        model.train(training)
        check_columns(dataset, ["ref_logps"])
        return dataset

    # -- scoring
    # ---------------------------------------------------------------------------------------------------------
    def score_pairs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[PairScores, PairScores]:
        """Per-token statistics of a collated batch (chosen rows, then rejected): ``(policy, reference)``."""
        return self._score(model, inputs)[:2]

    def _score(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[PairScores, PairScores, torch.Tensor | None]:
        """``score_pairs``, and the load-balancing loss of a mixture of experts."""
        mask = inputs["completion_mask"][:, 1:].bool()
        labels = inputs["input_ids"][:, 1:][mask]
        columns = {
            name.removeprefix("column/"): value[:, 1:] for name, value in inputs.items() if name.startswith("column/")
        }
        kept = {name: inputs[name] for name in inputs if name != "completion_mask" and not name.startswith("column/")}
        score: dict[str, Any] = {
            "mask": mask, "labels": labels, "needs": self.needs, "aux_loss": self.aux_loss_enabled,
        }  # fmt: skip
        # accelerate runs a prepared policy under autocast; the reference must run in the same precision
        with self.accelerator.autocast():
            if "ref_logps" not in columns or self.needs:
                score["ref_hidden"], score["ref_head"] = self._reference(kept, mask)
            stats: TokenStats = model(**kept, score=score)

        def spread(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            grid = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
            chosen, rejected = grid.masked_scatter(mask, values).chunk(2)
            return chosen, rejected

        masks = mask.chunk(2)
        policy = PairScores(*spread(stats.logps), *masks)
        if stats.ref_logps is not None:
            ref = PairScores(*spread(stats.ref_logps), *masks)
        else:
            ref = PairScores(*spread(columns["ref_logps"][mask]), *masks)
        for name in self.needs:
            policy.chosen[name], policy.rejected[name] = spread(getattr(stats, name))
        for name in self.data_columns:
            policy.chosen[name], policy.rejected[name] = (
                part * side for part, side in zip(columns[name].chunk(2), masks, strict=True)
            )
        return policy, ref, stats.aux_loss

    def _reference(self, kept: dict[str, Any], mask: torch.Tensor) -> tuple[torch.Tensor, OutputHead]:
        """Hidden states ``[N, D]`` of the reference at the response positions, and its head."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is not None:
                model = self.accelerator.unwrap_model(self.ref_model)
                return self.ref_model(**kept, score={"mask": mask}), output_head(model).detached()
            model = self.accelerator.unwrap_model(self.model)
            if not hasattr(model, "peft_config"):
                raise BadInputError(
                    "The reference was not kept, and this batch has no column ref_logps.",
                    "Pass ref_model, or evaluate on a dataset that was given to the trainer at the start.",
                )
            with reference_adapter(model):  # the head as well: PEFT may hold a trained copy of it
                return self.model(**kept, score={"mask": mask}), output_head(model).detached()

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        policy, reference, aux_loss = self._score(model, inputs)
        output = self.preference_loss(policy, reference)
        loss = output.losses.mean()
        self._log_pairs(output, policy, inputs)
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
            mode = "train" if self.model.training else "eval"
            self._metrics[mode]["aux_loss"].append(self.accelerator.gather(aux_loss.detach()).mean().item())
        if not torch.isfinite(loss):
            raise self._stopped(loss.item(), output, policy, inputs)
        if return_outputs:
            with torch.no_grad():
                return loss, model(**{name: inputs[name] for name in ("input_ids", "attention_mask")})
        return loss

    def _stopped(
        self, loss: float, output: PreferenceOutput, policy: PairScores, inputs: dict[str, Any]
    ) -> NonFiniteLossError:
        """Saves the batch and says where it is."""
        pairs = len(output.losses)
        ids, mask = inputs["input_ids"].tolist(), inputs["completion_mask"].bool().tolist()
        logps = [*policy.chosen_logps.detach().sum(1).tolist(), *policy.rejected_logps.detach().sum(1).tolist()]

        def row(index: int) -> dict[str, Any]:
            prompt = [token for token, response in zip(ids[index], mask[index], strict=True) if not response]
            response = [token for token, inside in zip(ids[index], mask[index], strict=True) if inside]
            texts = [self.processing_class.decode(part, skip_special_tokens=True) for part in (prompt, response)]
            return {"prompt": texts[0], "response": texts[1], "response_ids": response, "logps": logps[index]}

        saved = [
            {"loss": value, "chosen": row(index), "rejected": row(index + pairs)}
            for index, value in enumerate(output.losses.detach().tolist())
        ]
        return stopped(self, loss, saved)

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
        if self.monitor_kl:
            values["kl/chosen"] = policy.chosen["forward_kl"].detach().sum(1)
            values["kl/rejected"] = policy.rejected["forward_kl"].detach().sum(1)
        for name, value in values.items():
            self._metrics[mode][name].append(self.accelerator.gather(value).float().mean().item())


def _check_can_be_reloaded(policy: Any, args: DPOConfig | None) -> None:
    """Refuses a model of which TRL could make no reference: it loads one anew, by the name of the policy."""
    made_here = policy is not None and not isinstance(policy, str) and not hasattr(policy, "peft_config")
    precomputed = args is not None and args.precompute_ref_log_probs and not in_shards()
    if made_here and not precomputed and not getattr(policy.config, "_name_or_path", ""):
        raise BadInputError(
            "There is no reference: none was given, and the policy has no name or path that one could be loaded from.",
            "Give ref_model=copy.deepcopy(model).",
        )
