"""Any decoder in the tasks of lm-evaluation-harness: ``--model everytoken``.

::

    python -m everytoken.integrations.lm_eval --model everytoken --tasks gsm8k \\
        --model_args pretrained=Qwen/Qwen3-0.6B,decoder=tokenselect,budget=2048

lm-eval has no entry point for models, so this module registers the model and then runs lm-eval's own command line.
``decoder`` is a method's name (``everytoken papers``) or ``none``; arguments that lm-eval's own model does not know are
the decoder's settings. Without ``pretrained`` the embedded model answers.

A likelihood is asked of a model and not of a decoder, so tasks of likelihoods run with ``decoder=none`` only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import BadInputError, require
from ..core.loading import load_model, load_tokenizer
from ..serving.decoders import make_decoder, ready
from ..serving.text import StopTexts

if TYPE_CHECKING or find_spec("lm_eval") is not None:
    from lm_eval.models.huggingface import HFLM
else:  # the module can be read without it; a model cannot be made

    class HFLM:
        """Stands for lm-eval's model of transformers where that is not installed."""


NAME, NONE = "everytoken", "none"
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams")


class DecodedModel(HFLM):  # type: ignore[misc]
    """lm-eval's model of transformers, which writes with a decoder of this package.

    Args:
        decoder: a method's name, or ``none``.
        pretrained: as lm-eval takes it; None is the embedded model.
        arguments: those of lm-eval's model, and settings of the decoder.

    Raises:
        BadInputError: no such decoder, no such setting of it, or a model that it does not work with.
        MissingExtraError: lm-eval is not installed.
    """

    def __init__(self, decoder: str = NONE, pretrained: Any = None, **arguments: Any):
        require("lm_eval", "lm-eval", "everytoken in lm-eval")
        known = set(inspect.signature(HFLM.__init__).parameters)
        own = {key: value for key, value in arguments.items() if key in known}
        settings = {key: value for key, value in arguments.items() if key not in known}
        if decoder == NONE and settings:
            raise BadInputError(f"{', '.join(settings)}: settings of no decoder.", "Name one: decoder=...")
        self.decoder = None if decoder == NONE else make_decoder(decoder, settings)
        if pretrained is None:
            dtype, device = own.pop("dtype", "auto"), own.get("device")
            pretrained = load_model(dtype=dtype or "auto", device=device)
            own.setdefault("tokenizer", load_tokenizer())
        super().__init__(pretrained=pretrained, **own)
        if self.decoder is not None:
            self.decoder = ready(self.decoder, self.model, self.tokenizer)

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: Sequence[str], **arguments: Any
    ) -> torch.Tensor:
        """Rows ``[B, T]`` with what was written behind them, padded on the right.

        Raises:
            BadInputError: an argument of a task that no decoder knows.
        """
        if self.decoder is None:
            written: torch.Tensor = super()._model_generate(context, max_length, stop, **arguments)
            return written
        mask = arguments.pop("attention_mask", torch.ones_like(context))
        unknown = sorted(set(arguments) - {*SAMPLING})
        if unknown:
            raise BadInputError(f"{', '.join(unknown)}: no decoder knows these arguments of the task.")
        if not arguments.get("temperature") and not arguments.get("do_sample"):  # greedy, as lm-eval means 0
            arguments = {"do_sample": False} | {
                k: v for k, v in arguments.items() if k in ("num_beams", "repetition_penalty")
            }
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        stops = [text for text in stop if text not in set(self.tokenizer.all_special_tokens)]
        rows = []
        for ids, kept in zip(context, mask, strict=True):
            row = ids[kept.bool()][None]
            output: Any = self.decoder.generate(
                self.model, row, attention_mask=torch.ones_like(row), max_new_tokens=max_length - context.shape[1],
                stopping_criteria=[StopTexts(self.tokenizer, stops, row.shape[1])] if stops else None,
                pad_token_id=pad, **arguments,
            )  # fmt: skip
            rows.append(getattr(output, "sequences", output)[0, row.shape[1] :])
        wide = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        return torch.cat([context, wide], dim=1)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._check_likelihood()
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._check_likelihood()
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)
        return found

    def _check_likelihood(self) -> None:
        if self.decoder is not None:
            raise BadInputError(
                f"A task asks for likelihoods, which {type(self.decoder).__name__} does not change.",
                "Run such tasks with decoder=none.",
            )


def register() -> None:
    """Makes ``everytoken`` a model that lm-eval knows by name.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    require("lm_eval", "lm-eval", "everytoken in lm-eval")
    from lm_eval.api.registry import MODEL_REGISTRY, get_model, register_model

    get_model("dummy")  # fills the registry, which is lazy
    if NAME not in MODEL_REGISTRY:
        register_model(NAME)(DecodedModel)


def main() -> None:
    """lm-eval's command line, which knows ``--model everytoken``."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
