"""T-REG's claims: contrasting two prompts finds the tokens that carry the reward, and that helps DPO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..core.implicit_reward import ImplicitReward
from ..core.scoring import PromptResponse, score_rows
from ..training.column_makers import Example
from .base import Arms, Claim, Context, Reproduction, mean_ranks
from .beds.frontier import WHY, Work, figures, make_work, train_arm
from .beds.sentiment import TeacherRewards

BETTER = "Write something very positive, happy and kind.\n\n"
WORSE = "Write something very negative, sad and hateful.\n\n"
TEACHER = " The model that is asked with two prompts is the embedded one: the small policy follows no instructions."


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rho; equal values share their mean rank."""
    return float(np.corrcoef(mean_ranks(one), mean_ranks(other))[0, 1])


def lexicon_scores(work: Work, ids: Sequence[int]) -> list[float]:
    """VADER's score of the word that each token belongs to; 0 for words that it does not know."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    lexicon = SentimentIntensityAnalyzer().lexicon
    pieces = [work.writer.tokenizer.decode([token]) for token in ids]
    words: list[list[int]] = []
    for index, piece in enumerate(pieces):
        if words and piece[:1].isalpha() and pieces[index - 1][-1:].isalpha():
            words[-1].append(index)
        else:
            words.append([index])
    scores = [0.0] * len(ids)
    for members in words:
        word = "".join(pieces[index] for index in members).strip().lower()
        for index in members:
            scores[index] = lexicon.get(word, 0.0)
    return scores


def run(context: Context) -> Arms:
    from ..core.loading import load_model, load_tokenizer
    from ..preference.dpo import DPOLoss
    from ..preference.t_reg import ContrastivePromptRewards, TREGLoss

    work = make_work(context)
    teacher, tokenizer = load_model(context.model, dtype="float32", packed=True), load_tokenizer(context.model)
    asked = TeacherRewards(ContrastivePromptRewards(teacher, tokenizer, BETTER, WORSE, batch_size=64), work.writer)
    policy, dpo = train_arm(context, work, "DPO", DPOLoss(beta=0.1))
    context.report("asking the embedded model with two prompts", 0, 0)
    _, regularised = train_arm(context, work, "T-REG", TREGLoss(beta=0.1, alpha=0.25), [asked])
    arms = figures(context, {"DPO": dpo, "T-REG": regularised})
    context.report("token rewards against the lexicon", 0, 0)

    def credit(ids: torch.Tensor, mask: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
        return ImplicitReward(policy, work.start, 0.1).score(ids, mask, attention)

    # a row without a known word tells nothing, and asking a model of another size about it is what takes the time
    held_out = [row for row in fresh_rows(work, context) if any(lexicon_scores(work, row.response))]
    lexicon = np.concatenate([lexicon_scores(work, response) for _, response in held_out])
    known = lexicon != 0
    implicit = torch.cat(score_rows(held_out, credit, 64)).numpy()
    examples = [Example(None, prompt, response) for prompt, response in held_out]
    contrast = torch.cat(asked.annotate(examples)).numpy()
    arms["DPO"]["rank correlation with the lexicon"] = rank_correlation(implicit[known], lexicon[known])
    arms["T-REG"]["rank correlation with the lexicon"] = rank_correlation(contrast[known], lexicon[known])
    context.artifacts["lexicon words"] = int(known.sum())
    return arms


def fresh_rows(work: Work, context: Context) -> list[PromptResponse]:
    """Continuations of held-out openings by the start; a quick start knows few words, so it writes more of them."""
    torch.manual_seed(context.seed + 1)
    prompts = work.prompts * (8 if context.quick else 1)
    rows = work.writer.sample(work.start, prompts)
    return [PromptResponse(work.writer.encode(p), r) for p, r in zip(prompts, rows, strict=True) if r]


REPRODUCTION = Reproduction(
    name="t-reg",
    summary=(
        "T-REG and DPO from one start on the same sentiment pairs, equal steps; tokens' rewards against a sentiment "
        "lexicon"
    ),
    run=run,
    claims=[
        Claim(
            "reward at equal KL",
            "T-REG",
            "DPO",
            "up to +3.8 points (AlpacaEval 2)",
            kind="difference",
            why=WHY + TEACHER,
        ),
        Claim("reward at the end", "T-REG", "DPO", "higher", kind="difference", why=WHY + TEACHER),
        Claim(
            "rank correlation with the lexicon",
            "T-REG",
            "DPO",
            "a contrast of prompts finds token rewards",
            kind="difference",
            why=(
                "q of the embedded model under two prompts, against the implicit reward of the DPO arm, on held-out "
                "words that the lexicon knows."
            ),
        ),
    ],
    extra=("train", "trl"),
    bed="sentiment",
)
