"""HAT's claims: spelling noise costs it less than a model of subwords, and it adapts to a second language faster.

A HAT and a Llama over subwords (byte-level BPE of the same prose) share the shape of their backbone and read the same
windows of text for equally many steps. Bits per byte are measured on clean text, on text of which a tenth of the
characters is disturbed, and on German before and after further steps on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

HAT_ARM, BPE = "HAT", "subwords"
WHY = "networks of about 1M weights on 0.4 MB of prose, against 1B to 7B"


class Subwords:
    """The Llama over subwords: its tokenizer, its loss and its bits per byte."""

    def __init__(self, text: str, vocabulary: int, backbone: Any):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import LlamaConfig, LlamaForCausalLM

        self.tokenizer = Tokenizer(models.BPE())
        self.tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<s>"])
        self.tokenizer.train_from_iterator(text.splitlines(), trainer)
        settings = {**backbone.to_dict(), "vocab_size": vocabulary, "tie_word_embeddings": True}
        self.model = LlamaForCausalLM(LlamaConfig(**settings))

    def rows(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids ``[B, L]``, the start in front and padding behind, and their mask."""
        import torch

        found = [[0, *item.ids] for item in self.tokenizer.encode_batch(list(texts))]
        longest = max(map(len, found))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in found])
        return ids, torch.arange(longest) < torch.tensor([len(row) for row in found])[:, None]

    def loss(self, texts: Sequence[str]) -> torch.Tensor:
        ids, mask = self.rows(texts)
        result: torch.Tensor = self.model(ids, attention_mask=mask, labels=ids.masked_fill(~mask, -100)).loss
        return result

    def bits(self, texts: Sequence[str]) -> list[float]:
        import torch

        ids, mask = self.rows(texts)
        with torch.no_grad():
            logits = self.model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        nats = (-logits.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
        return [float(n) / math.log(2) / len(t.encode()) for n, t in zip(nats, texts, strict=True)]


def run(context: Context) -> Arms:
    from ..architectures.hat.method import HATTraining, bits_per_byte, noisy, rows_of
    from ..core.rng import derive_seed, numpy_generator, seed_everything
    from ..training.datasets.plain_text import TextWindows
    from ..training.stepwise import Stage, fit
    from .beds.texts import declarations

    quick = context.quick
    size = (
        {"steps": 25, "batch": 4, "length": 96, "byte_width": 64, "width": 96, "layers": 2}
        if quick
        else {"steps": 2500}
    )
    recipe = HATTraining(**size, seed=context.seed)  # type: ignore[arg-type]
    prose = TextWindows.of(None, context.seed)
    german = TextWindows(next(text for name, text in declarations().items() if "German" in name), 0.3, context.seed)
    held = recipe.texts(prose.held(8 if quick else 64, recipe.length))
    foreign = recipe.texts(german.held(4 if quick else 12, recipe.length))
    disturbed = [noisy(text, 0.1, numpy_generator(context.seed, "noise", n)) for n, text in enumerate(held)]

    def arm(name: str) -> dict[str, list[float]]:
        seed_everything(derive_seed(context.seed, "weights"))
        loss: Callable[[Sequence[str]], torch.Tensor]
        bits: Callable[[Sequence[str]], list[float]]
        model: PreTrainedModel
        if name == HAT_ARM:
            model = recipe.begin(None)
            loss = lambda texts: model(**rows_of(texts, recipe.max_word_bytes)).loss  # noqa: E731
            bits = lambda texts: bits_per_byte(model, texts)  # noqa: E731
        else:
            subwords = Subwords(
                prose.text[: int(len(prose.text) * 0.9)], 512 if quick else 2048, recipe.config().backbone_config
            )
            model, loss, bits = subwords.model, subwords.loss, subwords.bits

        def learn(stage: Stage, text: TextWindows) -> None:
            def step_loss(step: int) -> torch.Tensor:
                return loss(recipe.texts(text.batch(recipe.batch, recipe.length, stage.name, step)))

            context.artifacts[f"{stage.name} of {name}"] = fit(model, step_loss, stage, None, context.report)

        learn(recipe.stage("prose"), prose)
        clean, noise, before = bits(held), bits(disturbed), bits(foreign)
        learn(Stage("German", max(recipe.steps // 5, 5), recipe.lr / 2), german)
        return {
            "bits per byte": clean,
            "bits per byte more with noise": [b - a for a, b in zip(clean, noise, strict=True)],
            "bits per byte of German, before": before,
            "bits per byte of German": bits(foreign),
            "bits per byte of English, after": bits(held),
        }

    return {name: context.part(name, partial(arm, name)) for name in (HAT_ARM, BPE)}


REPRODUCTION = Reproduction(
    name="hat",
    summary="a HAT and a Llama over subwords with one shape of backbone: clean text, disturbed text, and German",
    run=run,
    claims=[
        Claim("bits per byte more with noise", HAT_ARM, BPE, "much more robust", "difference", higher_is_better=False,
              why=WHY),
        Claim("bits per byte", HAT_ARM, BPE, "equal", "ratio", higher_is_better=False, threshold=1.03, why=WHY),
        Claim("bits per byte of German", HAT_ARM, BPE, "better after adapting", "difference", higher_is_better=False,
              why=WHY),
    ],
)  # fmt: skip
