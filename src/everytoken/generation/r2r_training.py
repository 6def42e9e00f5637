"""Training R2R's router: labels from two models, then a small network (arXiv 2505.21600).

1. The large model answers the prompts, greedily.
2. The small model reads each answer in one forward. Where its arg-max is the large model's token, the token is *identical*.
3. At every mismatch the large model goes on from the text so far with the small model's token, and with its own, to the end of the
   sentence.
4. A verifier is given the common context and both continuations: *divergent* if they differ in meaning or conclusion, else *neutral*.
5. Binary cross-entropy on "divergent", positives weighted by ``(#negative / #positive) * recall_factor``; AdamW; early stopping.
6. The threshold is the largest that still finds ``min_recall`` of the divergent tokens of held-out prompts.

Verifiers: ``AnswerVerifier`` lets both continuations run to the end and compares what a function makes of them (for tasks that can be
checked); ``SimilarityVerifier`` compares sentence embeddings; ``JudgeVerifier`` asks a language model, as the paper does.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from ..core.errors import BadInputError
from ..core.scoring import turn_ids
from ..core.settings import load_function, read_text
from ..decoding.base import check_same_vocabulary
from ..training.base import Training, TrainingContext, TrainingResult
from .drafts.modeling_feature_draft import FeatureDraftForCausalLM, FeatureTap
from .routers.configuration_token_router import TokenRouterConfig
from .routers.modeling_token_router import TokenRouter, top_logits

IDENTICAL, NEUTRAL, DIVERGENT = 0, 1, 2
SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
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


@dataclass
class Labels:
    """Every position of the large model's answers, in order.

    Attributes:
        hidden, embedding, logits: the router's inputs ``[N, D]``, ``[N, E]``, ``[N, K]``.
        kinds: ``[N]`` IDENTICAL, NEUTRAL or DIVERGENT.
        prompts: ``[N]`` which prompt a position belongs to.
        small, large: ``[N]`` the small model's arg-max and the large model's token.
    """

    hidden: torch.Tensor
    embedding: torch.Tensor
    logits: torch.Tensor
    kinds: torch.Tensor
    prompts: torch.Tensor
    small: torch.Tensor
    large: torch.Tensor

    def where(self, keep: torch.Tensor) -> Labels:
        return Labels(**{name: value[keep] for name, value in vars(self).items()})


# -- verifiers -----------------------------------------------------------------------------------------------------------
@runtime_checkable
class Verifier(Protocol):
    """``(contexts, continuations with the small model's token, with the large one's) -> divergent?`` for N mismatches.

    ``to_the_end`` says whether the continuations should run to the answer's end instead of the sentence's.
    """

    to_the_end: ClassVar[bool]

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]: ...


@dataclass
class AnswerVerifier:
    """Divergent where the whole answer comes out different.

    Args:
        outcome: ``text -> anything comparable``, for example the number after "#".
    """

    outcome: Callable[[str], Any]
    to_the_end: ClassVar[bool] = True

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        pairs = zip(contexts, small, large, strict=True)
        return [self.outcome(context + a) != self.outcome(context + b) for context, a, b in pairs]


@dataclass
class SimilarityVerifier:
    """Divergent where the embeddings of the two sentences have a cosine below ``threshold``; needs the ``search`` extra."""

    threshold: float = 0.9
    to_the_end: ClassVar[bool] = False

    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        from ..core.embedding import embed

        sides = [
            [context[-80:] + text for context, text in zip(contexts, side, strict=True)] for side in (small, large)
        ]
        left, right = (torch.as_tensor(embed(side, "Comparing sentences")) for side in sides)
        return ((left * right).sum(-1) < self.threshold).tolist()


@dataclass
class JudgeVerifier:
    """Divergent where a language model says so, at temperature 0.

    Args:
        model, tokenizer: an instruction-tuned model; the stronger the better.
    """

    model: Any
    tokenizer: Any
    question: str = (
        "Two continuations of one text follow. Do they differ in meaning, reasoning or conclusion? Answer Yes or No.\n"
        "Text: {context}\nA: {small}\nB: {large}"
    )
    to_the_end: ClassVar[bool] = False

    @torch.inference_mode()
    def __call__(self, contexts: list[str], small: list[str], large: list[str]) -> list[bool]:
        words = [self.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
        answers = []
        for context, a, b in zip(contexts, small, large, strict=True):
            text = self.question.format(context=context[-600:], small=a, large=b)
            ids = turn_ids(self.tokenizer, text if self.tokenizer.chat_template else text + "\nAnswer:")
            logits = self.model(torch.tensor([ids], device=self.model.device), logits_to_keep=1).logits[0, -1]
            answers.append(bool(logits[words[0]] >= logits[words[1]]))
        return answers


class Diary:
    """Answers and verdicts as they come, one JSON object a line, so that an interrupted run goes on where it stopped.

    Args:
        path: the file; None keeps nothing.
        key: what the labels depend on; a file with another key is begun anew.
    """

    def __init__(self, path: Path | None = None, key: str = ""):
        self.path, self.answers, self.verdicts = path, [], {}  # type: ignore[var-annotated]
        if path is None:
            return
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        lines = text.splitlines()
        if lines[:1] != [json.dumps({"key": key})]:
            path.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
            return
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that an interruption cut off
            if "answer" in entry:
                self.answers.append(tuple(entry["answer"]))
            else:
                index, place, divergent = entry["verdict"]
                self.verdicts[index, place] = divergent
        if not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def write(self, entries: list[dict[str, Any]]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def add_answers(self, pairs: list[tuple[list[int], list[int]]]) -> None:
        self.answers += pairs
        self.write([{"answer": pair} for pair in pairs])

    def add_verdicts(self, places: list[tuple[int, int]], divergent: list[bool]) -> None:
        self.verdicts |= dict(zip(places, divergent, strict=True))
        self.write([{"verdict": [*place, verdict]} for place, verdict in zip(places, divergent, strict=True)])


# -- labels --------------------------------------------------------------------------------------------------------------
def answer(
    large: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, batch: int, report: Any, diary: Diary
) -> None:
    """The large model's greedy answers: ``(prompt ids, answer ids)`` each, into the diary."""
    for first in range(len(diary.answers), len(prompts), batch):
        report("the large model answers", first, len(prompts))
        encoded = [turn_ids(tokenizer, prompt) for prompt in prompts[first : first + batch]]
        new = _continue(large, tokenizer, encoded, max_new_tokens, None)
        diary.add_answers(list(zip(encoded, new, strict=True)))


@torch.inference_mode()
def _continue(
    large: Any, tokenizer: Any, texts: list[list[int]], max_new_tokens: int, stops: Sequence[str] | None
) -> list[list[int]]:
    """Greedy continuations of a ragged batch, each up to its end token, or to the first of ``stops``."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    width = max(map(len, texts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts], device=large.device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=large.device)
    criteria = StoppingCriteriaList()
    if stops is not None:
        criteria.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=list(stops)))
    output = large.generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=criteria
    )
    ends, rows = _end_tokens(large), []
    for row in output[:, width:].tolist():  # a row that is done is filled up, or goes on, until all are
        pieces = tokenizer.batch_decode([[token] for token in row]) if stops is not None else []
        done = [
            place
            for place, token in enumerate(row)
            if token in ends or (stops is not None and any(stop in pieces[place] for stop in stops))
        ]
        rows.append(row[: done[0] + 1] if done else row)
    return rows


@torch.inference_mode()
def read_answer(
    small: Any, large: Any, ids: list[int], new: list[int], vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The small model over one answer, in one forward: states ``[T, D]`` that the head reads, and logits ``[T, V]``."""
    text = torch.tensor([ids + new], device=large.device)
    if isinstance(small, FeatureDraftForCausalLM):
        tap = FeatureTap(large, small.config.feature_layers)
        try:
            large(text, logits_to_keep=1)
        finally:
            tap.remove()
        features = torch.cat([torch.zeros_like(tap.last[:, :1]), tap.last[:, :-1]], 1)
        output = small(text, features=features, logits_to_keep=len(new) + 1)
        states = output.hidden_states[0][0]
    else:
        seen: list[torch.Tensor] = []
        hook = small.get_output_embeddings().register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        try:
            output = small(text, logits_to_keep=len(new) + 1)
        finally:
            hook.remove()
        states = seen[0][0]
    part = slice(-len(new) - 1, -1)
    return states[part].float(), output.logits[0, part, :vocab].float()


def label(
    small: Any,
    large: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    verifier: Verifier,
    max_new_tokens: int = 256,
    max_sentence: int = 48,
    batch: int = 16,
    count: int = 100,
    report: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
    diary: Diary | None = None,
) -> Labels:
    """Steps 1 to 4: a label for every token of the large model's answers.

    Args:
        max_new_tokens: of an answer. ``max_sentence``: of a continuation (unless the verifier wants the whole answer).
        batch: texts continued at a time. ``count``: largest logits kept for the router.
        diary: what an interrupted call has found already.

    Raises:
        TokenizerMismatchError: the models have different vocabularies.
        BadInputError: no prompts, or nothing was answered.
    """
    vocab = check_same_vocabulary(large, small)
    if not prompts:
        raise BadInputError("There are no prompts to learn from.", "Give one a line.")
    diary = diary or Diary()
    answer(large, tokenizer, prompts, max_new_tokens, batch, report, diary)
    pairs = diary.answers
    if not any(new for _, new in pairs):
        raise BadInputError("The large model answered none of the prompts.", "Give others.")
    # a feature draft reads its target's embeddings
    embed = (large if isinstance(small, FeatureDraftForCausalLM) else small).get_input_embeddings()
    parts: list[dict[str, torch.Tensor]] = []
    mismatches: list[tuple[int, int]] = []
    for index, (ids, new) in enumerate(pairs):
        report("the small model reads", index, len(pairs))
        if not new:
            continue
        hidden, logits = read_answer(small, large, ids, new, vocab)
        chosen = logits.argmax(-1)
        truth = torch.tensor(new, device=chosen.device)
        with torch.inference_mode():
            embedding = embed(chosen).float()
        parts.append(
            {
                "hidden": hidden.cpu(),
                "embedding": embedding.cpu(),
                "logits": top_logits(logits, count).cpu(),
                "kinds": torch.where(chosen == truth, IDENTICAL, NEUTRAL).cpu(),
                "prompts": torch.full((len(new),), index),
                "small": chosen.cpu(),
                "large": truth.cpu(),
            }
        )
        mismatches += [(index, place) for place in (chosen != truth).nonzero()[:, 0].tolist()]
    known = {int(part["prompts"][0]): part for part in parts}
    left = [place for place in mismatches if place not in diary.verdicts]
    for first in range(0, len(left), batch):
        report("both ways go on", len(mismatches) - len(left) + first, len(mismatches))
        some = left[first : first + batch]
        diary.add_verdicts(some, _verify(large, tokenizer, pairs, known, some, verifier, max_new_tokens, max_sentence))
    for index, place in mismatches:
        if diary.verdicts[index, place]:
            known[index]["kinds"][place] = DIVERGENT
    return Labels(**{name: torch.cat([part[name] for part in parts]).clone() for name in parts[0]})


def _verify(
    large: Any,
    tokenizer: Any,
    pairs: list,
    parts: dict[int, dict[str, torch.Tensor]],
    places: list[tuple[int, int]],
    verifier: Verifier,
    max_new_tokens: int,
    max_sentence: int,
) -> list[bool]:
    """Continues both ways at some mismatches and asks the verifier."""
    prefixes = [pairs[index][0] + pairs[index][1][:place] for index, place in places]
    sides = []
    stops = None if verifier.to_the_end else SENTENCE_ENDS
    room = max_new_tokens if verifier.to_the_end else max_sentence
    ends = _end_tokens(large)
    for name in ("small", "large"):
        starts = [int(parts[index][name][place]) for index, place in places]
        texts = [[*prefix, token] for prefix, token in zip(prefixes, starts, strict=True)]
        longer = [row for row, token in enumerate(starts) if token not in ends]
        tails: list[list[int]] = [[] for _ in texts]
        if longer:
            for row, tail in zip(
                longer, _continue(large, tokenizer, [texts[row] for row in longer], room, stops), strict=True
            ):
                tails[row] = tail
        sides.append([tokenizer.decode([token, *tail]) for token, tail in zip(starts, tails, strict=True)])
    return verifier([tokenizer.decode(prefix) for prefix in prefixes], *sides)


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {int(ends)}


# -- the router ----------------------------------------------------------------------------------------------------------
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
    report: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
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


# -- `everytoken train r2r` ----------------------------------------------------------------------------------------------
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
    """Prompts of a file: one a line, or JSONL objects with a ``prompt``; without a file, a few examples.

    Raises:
        BadInputError: no such file, one that is no UTF-8, or a line that is neither; names it.
    """
    if data is None:
        return list(EXAMPLES)
    path, prompts = Path(data), []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                line = json.loads(line)["prompt"]
                assert isinstance(line, str)
                assert line.strip()
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise BadInputError(f"{data}, line {number}: no object with a text 'prompt'.") from error
        prompts.append(line)
    if len(prompts) < 2:
        raise BadInputError(f"{data} holds {len(prompts)} prompts; two are needed at least.", "Give one a line.")
    return prompts


def split_by_prompt(labels: Labels, share: float, seed: int) -> tuple[Labels, Labels]:
    """Training and held-out positions; no prompt is in both."""
    order = sorted(set(labels.prompts.tolist()))
    random.Random(seed).shuffle(order)
    kept = torch.tensor(order[: max(1, round(share * len(order)))])
    held = torch.isin(labels.prompts, kept)
    return labels.where(~held), labels.where(held)


def run(config: R2RTraining, context: TrainingContext) -> TrainingResult:
    """The whole pipeline; labels are kept in the output folder, and a second run with the same settings goes on from them."""
    from ..core.loading import load_model, load_tokenizer

    prompts = read_prompts(context.data)
    verifier: Any = None
    if config.verifier == "similarity":
        from ..core.embedding import require_embedder

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
            from .drafts import load_draft

            small: Any = load_draft(large)
        else:
            small = load_model(config.small, dtype="float32", packed=True)
        if config.verifier == "judge":
            verifier = JudgeVerifier(large, tokenizer)
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
    report.write_text(json.dumps({"figures": figures, "curves": curves, "settings": asdict(config)}, indent=1) + "\n")
    files = [context.out / "model.safetensors", context.out / "config.json", report, kept]
    return TrainingResult(figures, files, [*notes, f"Use it: R2R(small_model, router={str(context.out)!r})"])


LABEL_SETTINGS = ("small", "verifier", "similarity", "max_new_tokens", "max_sentence")
TRAINING = Training(
    name="r2r",
    summary="labels from the large and the small model's disagreements, then a router trained on them",
    config=R2RTraining,
    run=run,
)
