"""Star graphs: paths that a text from left to right has to guess, because only their end says where they begin.

Arms leave a centre. A graph is written as its edges in random order, then the pair of where the path starts and where
it ends; the answer is the edges of the path. An edge is one token, its two letters::

    DE CA FG AD CF  CE  ->  CA AD DE

At the centre every arm looks alike to whoever has not followed it to its end, and all later edges follow from the first
(arXiv 2403.06963). Where arms have several lengths, and a stem may lie in front of the centre, the length of the answer
is not known before either (arXiv 2505.05755).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...core.errors import BadInputError
from ...core.rng import numpy_generator

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

LETTERS = "ABCDEFG"
SPECIAL = ("_", "?", "^", "|", ".")
PAD, MASK, CLS, BOS, END = range(len(SPECIAL))
"""Ids of padding, of an open position, of the first token, of the token behind a question, and of the end."""
FIRST = len(SPECIAL)
"""The id of the pair AA; those of AB, AC and so on follow."""
TOKENS = (*SPECIAL, *(f" {first}{second}" for first in LETTERS for second in LETTERS))


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Ids of pairs of letters."""
    return FIRST + first * len(LETTERS) + second


@dataclass(frozen=True)
class StarGraphs:
    """Graphs of one kind.

    Args:
        degree: arms of a centre.
        arms: least and greatest number of edges of an arm; the arms of a graph are drawn one by one.
        stem: least and greatest number of edges between the start and the centre.
        nodes: letters to draw from.

    Raises:
        BadInputError: fewer letters than a graph may need, or numbers out of range.
    """

    degree: int = 2
    arms: tuple[int, int] = (3, 3)
    stem: tuple[int, int] = (0, 0)
    nodes: int = 7

    def __post_init__(self) -> None:
        if self.degree < 2 or not 1 <= self.arms[0] <= self.arms[1] or not 0 <= self.stem[0] <= self.stem[1]:
            raise BadInputError(f"A star has two arms of an edge at least; got {self}.")
        if not self.edges < self.nodes <= len(LETTERS):
            raise BadInputError(f"{self.edges + 1} to {len(LETTERS)} letters are needed; got {self.nodes}.")

    @property
    def edges(self) -> int:
        """Edges of the largest graph."""
        return self.degree * self.arms[1] + self.stem[1]

    @property
    def prompt_length(self) -> int:
        """Tokens of the longest question: CLS, edges, start and goal, BOS."""
        return self.edges + 3

    @property
    def answer_length(self) -> int:
        """Tokens of the longest answer."""
        return self.arms[1] + self.stem[1]

    def rows(self, count: int, rng: np.random.Generator) -> Graphs:
        """Random graphs, questions padded on the left and answers on the right."""
        prompts = np.full((count, self.prompt_length), PAD)
        answers = np.full((count, self.answer_length), PAD)
        # random keys in place of a shuffle a row: one call draws all of them
        letters = rng.random((count, self.nodes)).argsort(1)
        arms = rng.integers(self.arms[0], self.arms[1] + 1, (count, self.degree))
        stems = rng.integers(self.stem[0], self.stem[1] + 1, count)
        keys = rng.random((count, self.edges))
        chosen = rng.integers(self.degree, size=count)
        for row, names in enumerate(letters):
            stem = int(stems[row])
            lines, begin = [names[: stem + 1]], stem + 1
            for length in arms[row].tolist():
                lines.append(np.concatenate([names[stem : stem + 1], names[begin : begin + length]]))
                begin += length
            edges = np.concatenate([_pairs(line[:-1], line[1:]) for line in lines])
            edges = edges[keys[row, : len(edges)].argsort()]
            path = np.concatenate([lines[0][:-1], lines[1 + int(chosen[row])]])
            text = [CLS, *edges, _pairs(path[0], path[-1]), BOS]
            prompts[row, self.prompt_length - len(text) :] = text
            answers[row, : len(path) - 1] = _pairs(path[:-1], path[1:])
        return Graphs(prompts, answers)

    def questions(self, count: int, seed: int, *names: object) -> Graphs:
        """Graphs of a seed; other names give others."""
        return self.rows(count, numpy_generator(seed, "star graphs", *names))


EASY = StarGraphs()
"""Two arms of three edges each; the path starts at the centre, and its length is known."""
MEDIUM = StarGraphs(arms=(2, 3))
"""Two arms of two or three edges."""
KINDS = {"easy": EASY, "medium": MEDIUM}


@dataclass
class Graphs:
    """Questions and answers as ids.

    Attributes:
        prompts: ``[N, P]``, padded on the left.
        answers: ``[N, L]``, padded on the right.
    """

    prompts: np.ndarray
    answers: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def whole(self, end: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, response and attention, ``[N, P + L]`` each; with ``end``, answers are filled up with end tokens, which
        belong to the response (a row more, so that each has one).
        """
        import torch

        prompts, answers = torch.from_numpy(self.prompts), torch.from_numpy(self.answers)
        if end:
            answers = torch.nn.functional.pad(answers, (0, 1), value=PAD)
            answers = answers.masked_fill(answers == PAD, END)
        ids = torch.cat([prompts, answers], 1)
        attention = ids != PAD
        response = attention.clone()
        response[:, : prompts.shape[1]] = False
        return ids, response, attention

    def right(self, answers: list[list[int]]) -> list[float]:
        """1.0 for each answer that is the whole path, else 0.0; what stands behind an end token does not count."""
        return [float(wanted == given) for wanted, given in self._beside(answers)]

    def shares(self, answers: list[list[int]]) -> list[float]:
        """The share of the path's edges that each answer has, anywhere."""
        return [len(set(wanted) & set(given)) / len(wanted) for wanted, given in self._beside(answers)]

    def _beside(self, answers: list[list[int]]) -> list[tuple[list[int], list[int]]]:
        pairs = zip(self.answers, answers, strict=True)
        ended = ((wanted, given[: given.index(END)] if END in given else given) for wanted, given in pairs)
        return [(wanted[wanted != PAD].tolist(), given) for wanted, given in ended]


def star_tokenizer() -> PreTrainedTokenizerFast:
    """One token a pair of letters; a question gets its CLS and BOS. Spaces do not count."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({token: number for number, token in enumerate(TOKENS)}, unk_token="_"))
    core.normalizer = normalizers.Replace(Regex(r"[\s,]"), "")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z]{2}|."), "isolated"),
            pre_tokenizers.Metaspace(" ", prepend_scheme="always", split=False),  # texts show their pairs apart
        ]
    )
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="^ $A |", special_tokens=[("^", CLS), ("|", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="_",
        mask_token="?",
        cls_token="^",
        bos_token="|",
        eos_token=".",
        unk_token="_",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
