"""Training R2R's router: labels from two models (``labels``), then a small network (arXiv 2505.21600).

Steps 1 to 4 of the paper make the labels, with one of the ``verifiers``. Then:

5. Binary cross-entropy on "divergent", positives weighted by ``(#negative / #positive) * recall_factor``; AdamW; early
    stopping.
6. The threshold is the largest that still finds ``min_recall`` of the divergent tokens of held-out prompts.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from ...core.errors import BadInputError
from ...core.settings import load_function
from ...training.base import Training, TrainingContext, TrainingResult
from ...training.datasets.prompts import read_prompts as prompts_of_file
from .configuration_token_router import TokenRouterConfig
from .labels import DIVERGENT, IDENTICAL, NEUTRAL, Diary, Labels, Report, label
from .modeling_token_router import TokenRouter
from .verifiers import AnswerVerifier, JudgeVerifier, SimilarityVerifier, Verifier

EXAMPLES = (
    "Why is the sky blue?",
    "How many minutes are there in three hours?",
    "Write two sentences about owls.",
    "What is the capital of Australia, and on which river does it lie?",
    "Explain what a prime number is.",
    "Name three uses of copper.",
    "How does a refrigerator keep food cold?",
    "What should I do if my bicycle has a flat tyre?",
)


# -- the router --------------------------------------------------------------------------------------------------------
def train_router(
    labels: Labels,
    config: TokenRouterConfig,
    held_out: Labels,
    epochs: int = 50,
    patience: int = 10,
    lr: float = 5e-5,
    weight_decay: float = 5e-4,
    batch: int = 1024,
    recall_factor: float = 1.0,
    min_recall: float = 0.95,
    seed: int = 0,
    report: Report = lambda _stage, _done, _total: None,
) -> tuple[TokenRouter, dict[str, list[float]]]:
    """Steps 5 and 6: a router and its curves (training and held-out loss by epoch).

    Raises:
        BadInputError: no divergent token, or nothing but divergent ones, to learn from.
    """
    target = (labels.kinds == DIVERGENT).float()
    positive = float(target.sum())
    if positive in (0.0, float(len(target))):
        raise BadInputError(
            f"{positive:.0f} of {len(target)} tokens are divergent: there is nothing to tell apart.",
            "Use more prompts, another verifier, or a weaker small model.",
        )
    weight = torch.tensor((len(target) - positive) / positive * recall_factor)
    torch.manual_seed(seed)
    router = TokenRouter(config)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=weight_decay)
    checked = (held_out.kinds == DIVERGENT).float()
    curves: dict[str, list[float]] = {"loss": [], "held-out loss": []}
    best, best_state, waited = float("inf"), None, 0
    for epoch in range(epochs):
        router.train()
        total = 0.0
        for rows in torch.randperm(len(target)).split(batch):
            out = router(labels.hidden[rows], labels.embedding[rows], labels.logits[rows])
            loss = F.binary_cross_entropy_with_logits(out, target[rows], pos_weight=weight)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item() * len(rows) / len(target)
        out = values(router, held_out)
        missed = float(F.binary_cross_entropy_with_logits(out, checked, pos_weight=weight))
        curves["loss"].append(total)
        curves["held-out loss"].append(missed)
        report(f"the router learns, held-out loss {missed:.3f}", epoch + 1, epochs)
        if missed < best:
            best, waited = missed, 0
            best_state = {name: tensor.clone() for name, tensor in router.state_dict().items()}
        else:
            waited += 1
            if waited >= patience:
                break
    if best_state is not None:
        router.load_state_dict(best_state)
    router.config.threshold = choose_threshold(torch.sigmoid(values(router, held_out)), checked.bool(), min_recall)
    return router.eval(), curves


@torch.inference_mode()
def values(router: TokenRouter, labels: Labels, batch: int = 4096) -> torch.Tensor:
    """The router's logits for all positions: ``[N]``."""
    router.eval()
    rows = torch.arange(len(labels.kinds)).split(batch)
    return torch.cat([router(labels.hidden[r], labels.embedding[r], labels.logits[r]) for r in rows]).clone()


def choose_threshold(scores: torch.Tensor, divergent: torch.Tensor, min_recall: float) -> float:
    """The largest threshold at which at least ``min_recall`` of the divergent tokens score as high; 0.5 without any."""
    found = scores[divergent].sort(descending=True).values
    if len(found) == 0:
        return 0.5
    needed = max(1, int(-(-min_recall * len(found) // 1)))
    return float(found[min(needed, len(found)) - 1])


def threshold_for_share(scores: torch.Tensor, share: float) -> float:
    """The threshold at which about ``share`` of the tokens go to the large model."""
    return float(scores.sort(descending=True).values[min(int(share * len(scores)), len(scores) - 1)])


# -- `everytoken train r2r` --------------------------------------------------------------------------------------------
@dataclass
class R2RTraining:
    """Settings of ``everytoken train r2r``; ``--model`` is the large model.

    Args:
        small: the small model (hub id or folder); None is the embedded model's shipped draft.
        verifier: ``"similarity"`` (sentence embeddings), ``"judge"`` (the large model itself is asked), or
            ``module:function``, a function ``text -> outcome`` for tasks that can be checked.
        similarity: cosine below which two sentences count as different.
        max_new_tokens, max_sentence: lengths of answers and of continuations, in tokens.
        held_out: share of the prompts kept for early stopping and the threshold.
        width, num_blocks: of the router; the paper's are 1024 and 6.
        epochs, patience, lr, weight_decay, batch_size, recall_factor, min_recall: as in the paper.
        gather: texts that the large model continues at a time.
    """

    small: str | None = None
    verifier: str = "similarity"
    similarity: float = 0.9
    max_new_tokens: int = 128
    max_sentence: int = 40
    held_out: float = 0.2
    width: int = 1024
    num_blocks: int = 6
    epochs: int = 50
    patience: int = 10
    lr: float = 5e-5
    weight_decay: float = 5e-4
    batch_size: int = 1024
    recall_factor: float = 1.0
    min_recall: float = 0.95
    gather: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1 or not 0 < self.min_recall <= 1:
            raise BadInputError("held_out and min_recall are shares between 0 and 1.")
        if self.verifier not in ("similarity", "judge") and ":" not in self.verifier:
            raise BadInputError(
                f"Unknown verifier {self.verifier!r}.", "Use similarity, judge, or module:function (text -> outcome)."
            )


def read_prompts(data: str | None) -> list[str]:
    """Prompts of a file, as ``training.datasets.prompts`` has it; without a file, a few examples."""
    return list(EXAMPLES) if data is None else prompts_of_file(data)


def split_by_prompt(labels: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Training and held-out positions; no prompt is in both."""
    order = sorted(set(labels.prompts.tolist()))
    random.Random(seed).shuffle(order)
    kept = torch.tensor(order[: max(1, round(share * len(order)))])
    held = torch.isin(labels.prompts, kept)
    return labels.where(~held), labels.where(held)


def run(config: R2RTraining, context: TrainingContext) -> TrainingResult:
    """The whole pipeline; labels are kept in the output folder, and a second run with the same settings goes on from
    them."""
    from ...core.loading import load_model, load_tokenizer

    prompts = read_prompts(context.data)
    verifier: Verifier | None = None
    if config.verifier == "similarity":
        from ...core.embedding import require_embedder

        require_embedder("The verifier `similarity`")  # a missing extra is reported before any work
        verifier = SimilarityVerifier(config.similarity)
    elif config.verifier != "judge":
        verifier = AnswerVerifier(load_function(config.verifier, "A verifier", "--set verifier=checks:final_number"))
    context.out.mkdir(parents=True, exist_ok=True)
    kept = context.out / "labels.safetensors"
    asked = {name: value for name, value in asdict(config).items() if name in LABEL_SETTINGS}
    key = hashlib.sha256(json.dumps([asked, context.model, prompts]).encode()).hexdigest()
    labels = None
    if kept.is_file():
        try:
            with safe_open(kept, "pt") as file:
                if (file.metadata() or {}).get("key") == key:
                    labels = Labels(**{name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError, TypeError) as error:
            raise BadInputError(
                f"{kept} cannot be read: {error}", "Delete it; the labels will be made anew."
            ) from error
    notes = []
    if labels is None:
        tokenizer = load_tokenizer(context.model)
        large = load_model(context.model, dtype="float32", packed=True)
        if config.small is None:
            from ..speculative import load_draft

            small: Any = load_draft(large)
        else:
            small = load_model(config.small, dtype="float32", packed=True)
        if config.verifier == "judge":
            verifier = JudgeVerifier(large, tokenizer)
        assert verifier is not None
        labels = label(
            small,
            large,
            tokenizer,
            prompts,
            verifier,
            config.max_new_tokens,
            config.max_sentence,
            config.gather,
            report=context.report,
            diary=Diary(context.out / "labels.jsonl", key),
        )
        save_file({name: value.contiguous() for name, value in vars(labels).items()}, kept, {"key": key})
        (context.out / "labels.jsonl").unlink()  # it is all in the labels now
    else:
        notes.append(f"Labels were taken from {kept}.")
    learn, held = split_by_prompt(labels, config.held_out, config.seed)
    sizes = TokenRouterConfig(
        labels.hidden.shape[1],
        labels.embedding.shape[1],
        labels.logits.shape[1],
        config.width,
        config.num_blocks,
        small_model=config.small or "the shipped draft",
        large_model=context.model or "embedded",
    )
    router, curves = train_router(
        learn,
        sizes,
        held,
        config.epochs,
        config.patience,
        config.lr,
        config.weight_decay,
        config.batch_size,
        config.recall_factor,
        config.min_recall,
        config.seed,
        context.report,
    )
    router.save_pretrained(context.out)
    scores, truth = torch.sigmoid(values(router, held)), held.kinds == DIVERGENT
    routed = scores >= router.config.threshold
    figures = {
        "tokens": float(len(labels.kinds)),
        "identical": float((labels.kinds == IDENTICAL).float().mean()),
        "neutral": float((labels.kinds == NEUTRAL).float().mean()),
        "divergent": float((labels.kinds == DIVERGENT).float().mean()),
        "held-out recall": float(routed[truth].float().mean()) if bool(truth.any()) else float("nan"),
        "held-out share to the large model": float(routed.float().mean()),
        "threshold": float(router.config.threshold),
    }
    report = context.out / "training.json"
    report.write_text(
        json.dumps({"figures": figures, "curves": curves, "settings": asdict(config)}, indent=1) + "\n",
        encoding="utf-8",
    )
    files = [context.out / "model.safetensors", context.out / "config.json", report, kept]
    return TrainingResult(figures, files, [*notes, f"Use it: R2R(small_model, router={str(context.out)!r})"])


LABEL_SETTINGS = ("small", "verifier", "similarity", "max_new_tokens", "max_sentence")
TRAINING = Training(
    name="r2r",
    summary="labels from the large and the small model's disagreements, then a router trained on them",
    config=R2RTraining,
    run=run,
)
