"""Tokenizers of eight families, each built of the parts that the family's own ``tokenizer.json`` has, and trained here.

What differs between families is how text is cut, how spaces and unknown bytes are written, which tokens are added, and
which roles share a token. The vocabularies are small, everything else is as published.
"""

from __future__ import annotations

import json
from functools import lru_cache

from everytoken.tokenization.foreign_tokenizers import CL100K_PATTERN, QWEN_PATTERN

from .common import CORPUS, byte_level, sentencepiece

MARK = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACES = [MARK * count for count in range(2, 6)]


def fast(backend, **roles):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def byte_bpe(size, special, cut, normalizer=None, ignore_merges=False):
    """Byte-level BPE with this pre-tokenizer; special tokens stand behind the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = cut, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return backend


def split(pattern):
    from tokenizers import Regex, pre_tokenizers

    inner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), inner])


def gpt2():
    """One token is BOS, EOS, unknown and, as people set it, padding."""
    from tokenizers import pre_tokenizers

    end = "<|endoftext|>"
    backend = byte_bpe(360, [end], pre_tokenizers.ByteLevel(add_prefix_space=False))
    return fast(backend, bos_token=end, eos_token=end, unk_token=end, pad_token=end)


def smollm2():
    """Digits one by one before GPT-2's cut; padding is EOS."""
    from tokenizers import pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend = byte_bpe(350, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], cut)
    roles = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return fast(backend, unk_token="<|endoftext|>", **roles)


def llama3():
    from tokenizers import processors

    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    backend = byte_bpe(370, names, split(CL100K_PATTERN), ignore_merges=True)
    begin = (names[0], backend.token_to_id(names[0]))
    backend.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[begin])
    return fast(backend, bos_token=names[0], eos_token=names[1])


def qwen():
    """No BOS; another token pads; text is normalised (NFC)."""
    from tokenizers import normalizers

    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = byte_bpe(355, names, split(QWEN_PATTERN), normalizers.NFC())
    return fast(backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def marked_bpe(size, special):
    """A BPE model over text with marked spaces, with byte fallback."""
    from tokenizers import Tokenizer, models, trainers

    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, limit_alphabet=70, show_progress=False)
    trained.train_from_iterator([MARK + word for line in CORPUS for word in line.split()], trainer)
    state = json.loads(trained.to_str())["model"]
    names = list(
        dict.fromkeys([*special, *BYTES, MARK, *SPACES, "\n", *sorted(state["vocab"], key=state["vocab"].get)])
    )
    merges = [(MARK, MARK), *((MARK * count, MARK) for count in (2, 3, 4)), *map(tuple, state["merges"])]
    return models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=merges,
        byte_fallback=True,
        unk_token="<unk>",
        fuse_unk=True,
    )


def unmark(strip):
    from tokenizers import decoders

    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)


def mistral():
    """As transformers converts it: a space goes before a text that has none."""
    from tokenizers import Tokenizer, pre_tokenizers

    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    backend = Tokenizer(marked_bpe(120, special))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "first", split=False)
    backend.decoder = unmark(True)
    backend.add_special_tokens(special)
    return fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def gemma():
    """Runs of spaces are added tokens, written with marks; no space is put in front; one token has no embedding."""
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    backend = Tokenizer(marked_bpe(125, special))
    backend.normalizer = normalizers.Replace(" ", MARK)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = unmark(False)
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in [*SPACES, "\n"]])
    backend.add_special_tokens([AddedToken("<image_soft_token>", special=True, normalized=False)])
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return fast(backend, mask_token="<mask>", **roles)


def bert():
    """Lower case, accents and spaces lost."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    roles = {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]", "mask_token": "[MASK]"}
    return fast(backend, pad_token="[PAD]", **roles)


def unigram():
    """A SentencePiece unigram model with byte fallback."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(MARK, "always")
    trainer = trainers.UnigramTrainer(vocab_size=110, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    pieces = [tuple(item) for item in json.loads(backend.to_str())["model"]["vocab"] if item[0] not in special]
    known = {name for name, _ in pieces}
    extra = [(name, -12.0) for name in (MARK, "\n", "\t") if name not in known]
    vocabulary = [(name, 0.0) for name in special] + [(name, -20.0) for name in BYTES] + pieces + extra
    backend = Tokenizer(models.Unigram(vocabulary, 0, byte_fallback=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(MARK, "always"), unmark(True)
    backend.add_special_tokens(special)
    return fast(backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def supertokens():
    from everytoken.tokenization.supertokens import SupertokenTrainer

    return SupertokenTrainer(400, chunk_sizes=(0.3, 0.7)).train(CORPUS)


FAMILIES = {
    "GPT-2": gpt2,
    "SmolLM2": smollm2,
    "Llama 3": llama3,
    "Qwen": qwen,
    "Llama 2": sentencepiece,
    "Mistral": mistral,
    "Gemma": gemma,
    "BERT": bert,
    "unigram": unigram,
    "byte-level BPE": byte_level,
    "supertokens": supertokens,
}
LOSSLESS = [name for name in FAMILIES if name != "BERT"]


@lru_cache
def family(name):
    """A tokenizer by its family."""
    return FAMILIES[name]()
