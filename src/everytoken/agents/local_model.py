"""A causal language model of transformers as a planner's model: sampled plans, and letters from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class LocalModel:
    """Plans and decides with a local model.

    Args:
        model, tokenizer: of transformers.
        temperature, top_p, max_new_tokens: of sampled plans.
        batch: plans that are sampled at once.
        answer_tokens: of a short answer.
        processor: a logits processor for plans, such as ``everytoken.constraints``' for a grammar of valid actions.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    temperature: float = 0.8
    top_p: float = 0.95
    max_new_tokens: int = 128
    batch: int = 8
    answer_tokens: int = 24
    processor: Any = None

    def _inputs(self, prompt: str) -> Any:
        return self.tokenizer(prompt, return_tensors="pt").to(self.model.device)

    def _generated(self, prompt: str, count: int, **settings: Any) -> list[str]:
        inputs = self._inputs(prompt)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        output = self.model.generate(**inputs, num_return_sequences=count, pad_token_id=pad, **settings)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in new]

    def plans(self, prompt: str, count: int) -> list[str]:
        """Sampled texts up to a blank line."""
        texts: list[str] = []
        while len(texts) < count:
            settings: dict[str, Any] = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": 0,
            }
            if self.processor is not None:
                settings["logits_processor"] = [self.processor]
            number = min(self.batch, count - len(texts))
            texts += self._generated(prompt, number, max_new_tokens=self.max_new_tokens, **settings)
        return [text.strip("\n").split("\n\n")[0] for text in texts]

    def letters(self, prompt: str, letters: Sequence[str]) -> list[float]:
        """Log-probabilities of each letter as the next token, with and without a space before it, added up.

        Raises:
            BadInputError: a tokenizer that has no single token for a letter.
        """
        import torch

        with torch.no_grad():
            scores = self.model(**self._inputs(prompt)).logits[0, -1].float().log_softmax(-1)
        found = []
        for letter in letters:
            ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
            single = sorted({item[0] for item in ids if len(item) == 1})
            if not single:
                raise BadInputError(f"The tokenizer has no token for the letter {letter}.", 'Use chooser="vote".')
            found.append(float(scores[single].logsumexp(0)))
        return found

    def answer(self, prompt: str) -> str:
        """The likeliest text, up to the end of its first line."""
        text = self._generated(prompt, 1, max_new_tokens=self.answer_tokens, do_sample=False)[0]
        return text.strip().split("\n")[0]

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))
