"""Data columns: constants that a frozen model says about every response token, computed once and used again::

    # adds the columns chosen_guide_logps and rejected_guide_logps
    dataset = precompute(dataset, [ModelLogps(guide, column="guide_logps")])

Values are kept in the user's cache under the rows' tokens and the annotator's fingerprint, so a second run (another
loss, another seed, a resumed training) reads them. Under ``accelerate launch`` every process annotates its share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..core.errors import BadInputError
from ..core.files import write_whole
from ..core.progress import Report, silent, within
from ..core.scoring import PromptResponse, head_module, model_fingerprint, response_logps, score_rows
from ..training.column_makers import Example, TokenAnnotator
from ..training.distributed import process_state
from ..training.precision import autocast_name
from .collator import SIDES

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


@dataclass
class ModelLogps:
    """Log-probabilities of the response tokens under a frozen model: a guide, or the reference.

    Args:
        model: a causal language model with the policy's tokenizer.
        column: ``"guide_logps"`` (TGDPO's guide) or ``"ref_logps"`` (the reference).
        batch_size: rows a forward.
    """

    model: PreTrainedModel
    column: str = "guide_logps"
    batch_size: int = 16

    def __post_init__(self) -> None:
        head_module(self.model)

    def score(self, ids: torch.Tensor, mask: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """``[B, T]`` log-probabilities at the tokens where ``mask``, 0 elsewhere."""
        return response_logps(self.model, ids, mask, attention_mask)

    def annotate(self, examples: Sequence[Example], report: Report = silent) -> list[torch.Tensor]:
        rows = [PromptResponse(item.prompt_ids, item.response_ids) for item in examples]
        return score_rows(rows, self.score, self.batch_size, self.model.device, report)

    def fingerprint(self) -> str:
        return f"logps {model_fingerprint(self.model)}"


def missing_columns(dataset: Dataset, names: Collection[str]) -> list[str]:
    """Those of the columns ``names`` that the dataset lacks on a side."""
    present = set(getattr(dataset, "column_names", None) or ())
    return [name for name in names if not {f"{side}_{name}" for side in SIDES} <= present]


def check_columns(dataset: Dataset, names: Collection[str]) -> None:
    """Refuses columns that do not fit their tokens.

    Raises:
        BadInputError: a missing column, a row whose values are not as many as its tokens, or a value that is not
            finite; names row and column.
    """
    for name in names:
        for side in SIDES:
            column = f"{side}_{name}"
            if column not in dataset.column_names:
                raise BadInputError(
                    f"The loss needs the dataset columns chosen_{name} and rejected_{name}.",
                    "Pass annotators=[...] to the trainer, or call everytoken.preference.columns.precompute first.",
                )
            for index, (ids, values) in enumerate(zip(dataset[f"{side}_ids"], dataset[column], strict=True)):
                if len(ids) != len(values):
                    raise BadInputError(
                        f"Row {index}: {column} holds {len(values)} values for {len(ids)} tokens.",
                        "Columns belong to one tokenizer and chat template: compute them again.",
                    )
                if not np.isfinite(values).all():
                    raise BadInputError(f"Row {index}: {column} holds a value that is not finite.")


def precompute(
    dataset: Dataset,
    annotators: Sequence[TokenAnnotator],
    report: Report = silent,
    kept_end: int | None = None,
) -> Dataset:
    """A tokenized preference dataset with the annotators' columns.

    Args:
        dataset: rows with ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (as ``PreferenceTrainer`` prepares them)
            and, for annotators that read it, ``prompt``.
        annotators: each adds ``chosen_COLUMN`` and ``rejected_COLUMN``; columns that exist are kept as they are.
        report: called with ``(stage, done, total)``.
        kept_end: tokens at the end of every row that training reads (TRL's ``truncation_mode="keep_end"``); values
            then belong to the rows without their beginning, and are 0 in front of it. None reads whole rows: what is
            cut from their end changes no value before it.

    Raises:
        BadInputError: a dataset without length or without token columns.
    """
    wanted = [item for item in annotators if missing_columns(dataset, [item.column])]
    if not wanted:
        return dataset
    if not hasattr(dataset, "__len__"):
        raise BadInputError("Columns can be computed for a dataset with a length only.", "Load it without streaming.")
    if "chosen_ids" not in dataset.column_names:
        raise BadInputError(
            "The dataset is not tokenized: it has no chosen_ids.",
            "Take PreferenceTrainer(...).train_dataset, or let the trainer do it.",
        )
    context = [
        dataset[name] if name in dataset.column_names else [None] * len(dataset)
        for name in ("prompt", "tools", "chat_template_kwargs")
    ]
    whole = [
        Example(prompt, prompt_ids, ids, tools, template)
        for side in SIDES
        for prompt, tools, template, prompt_ids, ids in zip(
            *context, dataset["prompt_ids"], dataset[f"{side}_ids"], strict=True
        )
    ]
    examples = whole if kept_end is None else [_without_beginning(item, kept_end) for item in whole]
    for item in wanted:
        found = _kept(item, examples, report)
        values = [
            torch.cat([torch.zeros(len(row.response_ids) - len(part)), part])
            for row, part in zip(whole, found, strict=True)
        ]
        for number, side in enumerate(SIDES):
            part = values[number * len(dataset) : (number + 1) * len(dataset)]
            if f"{side}_{item.column}" not in dataset.column_names:
                dataset = dataset.add_column(f"{side}_{item.column}", [value.tolist() for value in part])
    return dataset


def _without_beginning(example: Example, length: int) -> Example:
    """A row's last ``length`` tokens. Where the prompt is gone, the first token stands for it: nothing predicts it."""
    ids = [*example.prompt_ids, *example.response_ids][-length:]
    start = max(1, len(ids) - len(example.response_ids))
    return replace(example, prompt_ids=ids[:start], response_ids=ids[start:])


def _kept(annotator: TokenAnnotator, examples: Sequence[Example], report: Report) -> list[torch.Tensor]:
    """The annotator's values, from the cache or computed (each process its share) and kept there."""
    from accelerate.utils import gather_object
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    from ..core.converted import cache_dir, check_writable

    digest = hashlib.sha256(f"{annotator.fingerprint()}{autocast_name()}".encode())
    for item in examples:
        digest.update(repr(item.prompt).encode())
        if item.tools or item.chat_template_kwargs:
            digest.update(repr((item.tools, item.chat_template_kwargs)).encode())
        for ids in (item.prompt_ids, item.response_ids):
            digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    path = cache_dir() / "columns" / f"{annotator.column}-{digest.hexdigest()[:24]}.safetensors"
    sizes = [len(item.response_ids) for item in examples]
    state = process_state()
    found: Any = None
    if path.is_file():
        try:
            found = load_file(path)["values"]
        except (OSError, SafetensorError, KeyError):
            found = None  # a damaged file is computed again
    # all processes must agree: one may see a file that another does not (folders that are not shared)
    if all(gather_object([found is not None and len(found) == sum(sizes)])):
        return list(found.split(sizes))
    # as many rows each, the last ones twice: models in shards need all processes at every forward
    share = -(-len(examples) // state.num_processes)
    mine = [min(state.process_index * share + place, len(examples) - 1) for place in range(share)]
    name = annotator.column
    local = annotator.annotate([examples[index] for index in mine], within(report, f"annotating {name}"))
    values = dict(gather_object(list(zip(mine, local, strict=True))))
    ordered = [values[index] for index in range(len(examples))]
    if state.is_local_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path.parent)
        write_whole(path, lambda beside: save_file({"values": torch.cat(ordered).contiguous()}, beside))
    state.wait_for_everyone()
    return ordered
