"""Tokenizers of other families as transformers tokenizers: tiktoken-like rank files, Tekken, SentencePiece."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
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
"""How Qwen cuts text before merging."""
CL100K_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
"""How cl100k and Llama 3 do: as Qwen, but for runs of up to three digits."""
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class RankFamily:
    """What a file of tiktoken ranks does not say: how text is cut, and the special tokens.

    Attributes:
        pattern: the regular expression that cuts text into pre-tokens.
        special: ``{text: id}``; an id below 0 counts from the end of the ranks (-1 is the first behind them).
        end, begin: texts of EOS and BOS.
        normalizer: of ``tokenizers``, or None.
        sha256: of the files that are known to be of this family, line ends as on Unix.
    """

    pattern: str
    special: Mapping[str, int]
    end: str
    begin: str | None = None
    normalizer: str | None = None
    sha256: tuple[str, ...] = ()


_TEXT_END = "<|endoftext|>"
FAMILIES = {
    "qwen": RankFamily(
        QWEN_PATTERN,
        {_TEXT_END: -1, "<|im_start|>": -2, "<|im_end|>": -3},
        _TEXT_END,
        normalizer="NFC",
        sha256=("b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",),
    ),
    "cl100k": RankFamily(
        CL100K_PATTERN,
        {
            _TEXT_END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        _TEXT_END,
        sha256=("223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",),
    ),
    "o200k": RankFamily(
        O200K_PATTERN,
        {_TEXT_END: 199999, "<|endofprompt|>": 200018},
        _TEXT_END,
        sha256=("446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",),
    ),
    "gpt2": RankFamily(
        GPT2_PATTERN,
        {_TEXT_END: 50256},
        _TEXT_END,
        sha256=(
            "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930",
            "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069",
        ),
    ),
    "llama3": RankFamily(
        CL100K_PATTERN,
        {
            "<|begin_of_text|>": 128000,
            "<|end_of_text|>": 128001,
            "<|start_header_id|>": 128006,
            "<|end_header_id|>": 128007,
            "<|eot_id|>": 128009,
        },
        "<|end_of_text|>",
        "<|begin_of_text|>",
        sha256=("82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",),
    ),
}
"""Families of rank files by name."""
PACKAGED = {
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
    "tekken": ("mistral_common", "data/tekken_240911.json"),
    "qwen": ("dashscope", "resources/qwen.tiktoken"),
}
"""Tokenizers that ship inside packages: name -> (module, file)."""


def from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str,
    special_tokens: Mapping[str, int] | None = None,
    normalizer: str | None = None,
    **roles: str,
) -> PreTrainedTokenizerBase:
    """A tokenizer from tiktoken's mergeable ranks.

    Args:
        ranks: ``{bytes: id}``.
        pattern: the regular expression that cuts text into pre-tokens.
        special_tokens: ``{text: id}``.
        normalizer: of ``tokenizers``, for example ``"NFC"``.
        roles: ``eos_token="..."`` and so on.

    Raises:
        BadInputError: a byte is missing, or an id is used twice.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
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
    if normalizer is not None:
        backend.normalizer = getattr(normalizers, normalizer)()
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


def is_ranks(path: Path) -> bool:
    """Whether a file looks like tiktoken ranks (Llama 3 calls such a file ``tokenizer.model``)."""
    with path.open("rb") as file:
        words = file.readline(200).split()
    try:
        return len(words) == 2 and bool(base64.b64decode(words[0], validate=True)) and int(words[1]) >= 0
    except ValueError:
        return False


def from_rank_file(path: Path, pattern: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from a file of tiktoken ranks.

    Args:
        pattern: a name in ``FAMILIES``, or a regular expression; default: the family whose published file this is.

    Raises:
        BadInputError: no such file, or one of an unknown family without a pattern: it does not say itself how text is
            cut, and another pattern gives other tokens.
    """
    ranks = read_ranks(path)
    if pattern is None:
        digest = hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()
        pattern = next((name for name, family in FAMILIES.items() if digest in family.sha256), None)
    if pattern is None:
        raise BadInputError(
            f"{path} is none of the published rank files that are known here, and does not say how text is cut.",
            f"Name its family, {path.name}@NAME with NAME one of {', '.join(FAMILIES)}, or pass pattern= with the "
            "regular expression.",
        )
    family = FAMILIES.get(pattern) or RankFamily(pattern, {_TEXT_END: -1}, _TEXT_END)
    last = max(ranks.values())
    special = {text: index if index >= 0 else last - index for text, index in family.special.items()}
    taken = set(ranks.values()) & set(special.values())
    if taken:
        raise BadInputError(
            f"{path} is no file of the family {pattern}: it has {len(ranks):,} ranks, and the ids of the family's "
            "special tokens are among them.",
            "Pass pattern= with the regular expression of its own.",
        )
    roles = {"eos_token": family.end} | ({} if family.begin is None else {"bos_token": family.begin})
    return from_ranks(ranks, family.pattern, special, family.normalizer, **roles)


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


def load_any_tokenizer(name: str, pattern: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer by name or file.

    Args:
        name: a packaged one (``mistral``, ``tekken``, ``qwen``), a file (``.tiktoken``, ``.model``, ``.json``), a
            folder, or a hub id. ``FILE.tiktoken@FAMILY`` says which family's pattern a rank file is cut with.
        pattern: for rank files, see ``from_rank_file``.

    Raises:
        BadInputError: there is none, a file of an unknown kind, or a rank file whose pattern is not known.
        MissingExtraError: a packaged one whose package is not installed.
    """
    path = Path(name).expanduser()
    file, _, family = name.rpartition("@")
    if family in FAMILIES and not path.exists() and Path(file).expanduser().is_file():
        path, pattern = Path(file).expanduser(), family
    if name in PACKAGED and not path.exists():
        module, inside = PACKAGED[name]
        require(module, extra_of(module), f"The tokenizer {name}")
        spec = find_spec(module)
        assert spec is not None and spec.origin is not None
        path = Path(spec.origin).parent / inside
        pattern = name if name in FAMILIES else pattern
    if (path / "tokenizer.json").is_file() and not (path / "config.json").is_file():  # a tokenizer without a model
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not path.is_file():
        from ..core.loading import load_tokenizer

        return load_tokenizer(name)
    if path.suffix == ".tiktoken" or is_ranks(path):
        return from_rank_file(path, pattern)
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
