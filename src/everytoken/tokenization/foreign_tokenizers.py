"""Tokenizers of other families as transformers tokenizers: tiktoken-like rank files, Tekken, SentencePiece."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import BadInputError, extra_of, require
from ..core.vocabulary import byte_stand_ins

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen (and, but for runs of digits, cl100k) cuts text before merging."""
PACKAGED = {
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
    "tekken": ("mistral_common", "data/tekken_240911.json"),
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
}
"""Tokenizers that ship inside packages: name -> (module, file)."""


def from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str = QWEN_PATTERN,
    special_tokens: Mapping[str, int] | None = None,
    **roles: str,
) -> PreTrainedTokenizerBase:
    """A tokenizer from tiktoken's mergeable ranks.

    Args:
        ranks: ``{bytes: id}``.
        pattern: the regular expression that cuts text into pre-tokens.
        special_tokens: ``{text: id}``.
        roles: ``eos_token="..."`` and so on.

    Raises:
        BadInputError: a byte is missing, or an id is used twice.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise BadInputError(
            f"The rank table lacks {len(missing)} single bytes, {missing[0]} among them.", "Is it whole?"
        )
    special = dict(special_tokens or {})
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) != len(ids):
        raise BadInputError("Two tokens of the rank table have the same id.", "Give special tokens ids of their own.")
    stand_in = {byte: char for char, byte in byte_stand_ins().items()}

    def printable(data: bytes) -> str:
        return "".join(stand_in[byte] for byte in data)

    merges = []
    for token, rank in ranks.items():
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        parts = [(ranks[a], ranks[b], a, b) for a, b in cuts if a in ranks and b in ranks]
        merges += [(rank, order, a, b) for order, (_, _, a, b) in enumerate(sorted(parts))]
    merges.sort(key=lambda item: item[:2])
    vocab = {printable(token): rank for token, rank in ranks.items()}
    pairs = [(printable(a), printable(b)) for _, _, a, b in merges]
    backend = Tokenizer(models.BPE(vocab=vocab | special, merges=pairs, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def read_ranks(path: Path) -> dict[bytes, int]:
    """A ``.tiktoken`` file: base64 and rank, a line each.

    Raises:
        BadInputError: it is none.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, OSError) as error:
        raise BadInputError(f"{path} is no file of tiktoken ranks: {error}", "A line is: BASE64 RANK.") from error


def read_tekken(path: Path) -> PreTrainedTokenizerBase:
    """Mistral's ``tekken.json``.

    Raises:
        BadInputError: it is none.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = data["config"]
        count = int(config["default_num_special_tokens"])
        size = int(config["default_vocab_size"]) - count
        names = [item["token_str"] for item in data.get("special_tokens") or []] or ["<unk>", "<s>", "</s>"]
        names += [f"<SPECIAL_{index}>" for index in range(len(names), count)]
        ranks = {base64.b64decode(item["token_bytes"]): count + item["rank"] for item in data["vocab"][:size]}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BadInputError(f"{path} is no tekken.json: {error!r}", "Check the file.") from error
    special = {name: index for index, name in enumerate(names[:count])}
    return from_ranks(ranks, config["pattern"], special, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def load_any_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer by name or file.

    Args:
        name: a packaged one (``mistral``, ``tekken``, ``qwen``), a file (``.tiktoken``, ``.model``, ``.json``), a
            folder, or a hub id.

    Raises:
        BadInputError: there is none, or a file of an unknown kind.
        MissingExtraError: a packaged one whose package is not installed.
    """
    path = Path(name).expanduser()
    if name in PACKAGED and not path.exists():
        module, inside = PACKAGED[name]
        require(module, extra_of(module), f"The tokenizer {name}")
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).parent / inside
    if (path / "tokenizer.json").is_file() and not (path / "config.json").is_file():  # a tokenizer without a model
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not path.is_file():
        from ..core.loading import load_tokenizer

        return load_tokenizer(name)
    if path.suffix == ".tiktoken":
        ranks = read_ranks(path)
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        special = {text: max(ranks.values()) + 1 + index for index, text in enumerate(names)}
        return from_ranks(ranks, special_tokens=special, eos_token=names[0])
    if path.suffix == ".json":
        if '"vocab"' in path.read_text(encoding="utf-8") and "token_bytes" in path.read_text(encoding="utf-8"):
            return read_tekken(path)
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(tokenizer_file=str(path))
    if ".model" in path.name:
        return read_sentencepiece(path)
    raise BadInputError(
        f"{path} is no tokenizer file that is known here.", "Known: .tiktoken, .json, .model, or a folder."
    )


def read_sentencepiece(path: Path) -> PreTrainedTokenizerBase:
    """A SentencePiece ``.model`` (Llama's kind), converted by transformers (which cuts runs of spaces in its own way).

    Raises:
        MissingExtraError: sentencepiece is not installed.
    """
    require("sentencepiece", "tokenizers", "Reading a SentencePiece model")
    import shutil
    import tempfile

    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:  # transformers wants it under this name
        shutil.copy(path, Path(folder) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
