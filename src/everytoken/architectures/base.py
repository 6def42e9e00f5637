"""The contract of this station: what every network says about itself, and what it shows of its decisions.

A method is a dataclass that inherits ``Architecture`` and is named by its card. It declares its classes, trace columns
and what it cannot do (``Network``), and shows what it decides on a text (``observe``)::

    @dataclass
    class MyMethod(Architecture):
        declares = Network(MyConfig, MyModelForCausalLM, columns=("gate",), lacks={"cache": "words end late"})
        weights = "my-method-text"            # the folder of its shipped weights

``everytoken try``, ``compare``, ``train`` and the battery ``everytoken.testing.architecture`` need no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.errors import BadInputError
from ..core.quiet import quiet_transformers
from ..core.trace import TokenTrace
from ..core.weights import check_no_pickle, weights_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Inputs: TypeAlias = dict[str, torch.Tensor]

FEATURES: dict[str, str] = {
    "generate": "write text with transformers' generate",
    "cache": "generate with a cache as without one",
    "padding": "read padded rows, on either side, as it reads each row alone",
    "inputs_embeds": "take embeddings in place of ids",
    "sdpa": "run with sdpa attention as with eager",
    "bf16": "run in bfloat16",
    "checkpointing": "recompute activations in the backward pass",
    "peft": "take adapters of PEFT",
    "trainer": "train with transformers' Trainer",
    "sft": "train with TRL's SFTTrainer",
    "compile": "compile into one graph",
}
"""What the battery asks of a network."""


@dataclass(frozen=True)
class Network:
    """What a network declares.

    Attributes:
        config, model: its classes; ``model.config_class`` is ``config``.
        columns: of its trace, the decision itself first.
        auto: the Auto class that loads it.
        lacks: what it cannot do -> why, as the end of a sentence; keys are those of ``FEATURES``.

    Raises:
        BadInputError: no column, an unknown feature, or one without a reason.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    columns: tuple[str, ...]
    auto: str = "AutoModelForCausalLM"
    lacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:
            raise BadInputError(f"{self.model.__name__} declares no trace column.")
        for name, why in self.lacks.items():
            if name not in FEATURES or not why:
                said = f"{self.model.__name__} lacks {name!r}: {why or 'no reason given'}."
                raise BadInputError(said, f"Features: {', '.join(FEATURES)}; each with a reason.")


@dataclass
class Observation:
    """What a network decided on one text.

    Attributes:
        traces: one a text or stage, with the columns that the network declares.
        figures: name with unit -> value.
        text: what it wrote, if it wrote.
        pictures: pieces of HTML.
        notes: sentences worth saying.
        drawing: lines for the terminal that show what it drew, or how its text grew.
    """

    traces: list[TokenTrace]
    figures: dict[str, float] = field(default_factory=dict)
    text: str = ""
    pictures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    drawing: str = ""


@dataclass
class Architecture:
    """A method of this station; fields of a subclass are its settings at inference.

    Attributes:
        declares: see ``Network``.
        weights: folder of shipped weights that ``everytoken try`` takes without ``--model``; empty if none ship.
        example: the text that ``try`` shows without ``--prompt``.
        headline: the figure that ``try`` plots.
        recipe: the dataclass that trains it from text (``architectures.training.Recipe``), or None.
        trace_columns: those declared.
    """

    declares: ClassVar[Network]
    weights: ClassVar[str] = ""
    example: ClassVar[str] = "The quick brown fox jumps over the lazy dog."
    headline: ClassVar[str] = "milliseconds"
    recipe: ClassVar[type | None] = None
    trace_columns: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "declares" in vars(cls):
            cls.trace_columns = cls.declares.columns

    @classmethod
    def tiny(cls) -> PreTrainedModel:
        """A random network of a few thousand weights; tests run on it."""
        raise NotImplementedError(cls.__name__)

    @classmethod
    def tiny_tokenizer(cls) -> PreTrainedTokenizerBase | None:
        """The tokenizer of that network, where it needs one."""
        return None

    def observe(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: str, new_tokens: int = 0
    ) -> Observation:
        """What the network of a folder decides on a text, with these settings.

        Args:
            new_tokens: how many to write behind the text; networks that write none take no notice.
        """
        raise NotImplementedError(f"{type(self).__name__} shows nothing.")

    def arms(self) -> dict[str, Architecture]:
        """What ``try`` runs besides the method itself, by name: the baseline first."""
        return {}

    @classmethod
    def inputs(cls, model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> Inputs:
        """Random inputs of a forward, with ``labels``: ids ``[batch, length]`` that are neither padding nor an end."""
        config = model.config.get_text_config()
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, config.vocab_size, (batch, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    @classmethod
    def folder(cls, model: str | None = None) -> Path:
        """Where a network lies: the user's folder, or the shipped weights.

        Raises:
            BadInputError: neither, no such folder, or a checkpoint of another method.
        """
        if model is None and not cls.weights:
            raise BadInputError(f"No weights of {cls.__name__} ship.", "Train some, and give --model FOLDER.")
        path = weights_folder(cls.weights) if model is None else Path(model).expanduser()
        if not (path / "config.json").is_file():
            raise BadInputError(f"{path} is no folder of a model: it has no config.json.")
        found, wanted = PreTrainedConfig.get_config_dict(path)[0].get("model_type"), cls.declares.config.model_type
        if found != wanted:
            raise BadInputError(f"{path} holds a {found} model, not a {wanted}.", "Give a folder of this method.")
        check_no_pickle(path)
        return path

    @classmethod
    def load(cls, model: str | None = None, dtype: str = "float32") -> PreTrainedModel:
        """The network of a folder, in evaluation mode; raises as ``folder`` does."""
        with quiet_transformers():
            network = cls.declares.model
            return network.from_pretrained(cls.folder(model), dtype=dtype, use_safetensors=True).eval()


def is_architecture(factory: object) -> bool:
    """Whether something is a method's class."""
    return isinstance(factory, type) and issubclass(factory, Architecture) and hasattr(factory, "declares")


class OwnWeights:
    """Inherited, first, by networks and their parts that are models: transformers then asks ``_init_weights`` for every
    module. For classes of other packages it skips modules without weights of their own (T5's blocks, for one).
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        return False


def register(config: type[PreTrainedConfig], model: type[PreTrainedModel], *autos: str) -> None:
    """Makes ``AutoConfig`` and the Auto classes of these names know a network; called where its class is defined."""
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in autos:
        getattr(transformers, name).register(config, model, exist_ok=True)
