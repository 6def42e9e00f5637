"""XGrammar's claims: masks cost almost nothing, against computing them without the split, and end to end."""

from __future__ import annotations

import json
import statistics
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.scoring import encode_prompt
from .base import Arms, Claim, Context, Reproduction, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "email": {"type": "string", "pattern": "^[a-z0-9.]+@[a-z0-9]+\\.[a-z]{2,3}$"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["city"],
        },
    },
    "required": ["name", "age", "address"],
}
DOCUMENTS = [
    {
        "name": "Ada King",
        "age": 36,
        "email": "ada@x.org",
        "tags": ["maths", "engines"],
        "address": {"street": "12 Main St", "city": "London"},
    },
    {"name": "Bo", "age": 7, "address": {"city": "Århus"}},
]
ANYTHING = [
    {"id": 17, "items": [{"k": "v", "n": None}, [1, 2.25, "three"], {}], "text": 'jagen "Viktor"'},
    [[], {"a": {"b": [True]}}],
]
PROMPTS = [
    "Describe a person as JSON with name, age, tags and address.",
    "Invent a customer of a bookshop and write the customer's data as JSON.",
    "Write the JSON record of a famous painter.",
]
WHY_MASK = (
    "The paper's baselines are other engines, on grammars of their own; here the baseline is the same automaton with "
    "neither the "
    "split nor memory: every token is run from the stack at every step (prefixes shared in a trie). Against today's "
    "xgrammar and "
    "llguidance see benchmarks/bench_constraints.py."
)
WHY_END = (
    "One request on two CPU cores; the paper measures a serving engine on a GPU, where a forward pass takes "
    "milliseconds."
)


def mask_times(
    compiled: Any, documents: list[Any], tokenizer: PreTrainedTokenizerBase, repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds for each mask: of the engine (all passes, the first with cold caches), and without split and memory."""
    from ..constraints.engine.analysis import settle_one
    from ..constraints.engine.matcher import GrammarMatcher
    from ..constraints.engine.tables import BOTTOM

    engine, naive = [], []
    info = compiled.tokenizer_info
    mask, trie = np.zeros(info.words, np.int32), info.trie.packed()
    depend = np.zeros(info.trie.size, np.int32)
    for again in range(repeats):
        for document in documents:
            matcher = GrammarMatcher(compiled)
            for token in tokenizer(json.dumps(document, ensure_ascii=False), add_special_tokens=False)["input_ids"]:
                began = time.perf_counter()
                matcher.fill_next_token_bitmask(mask)
                engine.append(time.perf_counter() - began)
                if again == 0:
                    arena, stacks = matcher._arena, matcher._step.state.stacks
                    began = time.perf_counter()
                    words = np.zeros(info.words, np.uint32)
                    for place in range(0, len(stacks), 2):
                        context, frame = [stacks[place]], stacks[place + 1]
                        while frame >= 0:
                            context.append(arena.frame_node.item(frame))
                            frame = arena.frame_parent.item(frame)
                        whole = np.array([*context, BOTTOM], np.int32)
                        settle_one(compiled.packed, trie, whole, words, depend)
                    naive.append(time.perf_counter() - began)
                    ends = matcher.can_end()
                    assert ends or np.array_equal(words.view(np.int32), mask), "both ways must agree"
                assert matcher.accept_token(token)
    return engine, naive


def run(context: Context) -> Arms:
    import jsonschema
    import torch

    from ..constraints.engine.compiler import GrammarCompiler
    from ..constraints.engine.matcher import GrammarMatcher
    from ..constraints.engine.vocabulary import TokenizerInfo
    from ..constraints.xgrammar import XGrammar
    from ..core.loading import load_tokenizer

    tokenizer = load_tokenizer(context.model)
    model = context.load_model()
    vocab = model.config.get_text_config().vocab_size
    info = TokenizerInfo.from_huggingface(tokenizer, vocab)
    compiler = GrammarCompiler(info, cache_limit=0)
    schema, anything = compiler.compile_json_schema(SCHEMA), compiler.compile_builtin_json_grammar()
    GrammarMatcher(anything).allowed_tokens()  # the kernels are compiled
    context.report("masks along documents", 0, 0)
    arms: Arms = {}
    split: dict[str, Values] = {}
    naive: dict[str, Values] = {}
    for name, compiled, documents in (("schema", schema, DOCUMENTS), ("any JSON", anything, ANYTHING)):
        engine_times, naive_times = mask_times(compiled, documents, tokenizer, 2 if context.quick else 5)
        split[f"mask, {name}, microseconds"] = 1e6 * statistics.mean(engine_times)
        naive[f"mask, {name}, microseconds"] = 1e6 * statistics.mean(naive_times)
        split[f"mask, {name}, median"] = 1e6 * statistics.median(engine_times)
    arms["engine"], arms["no split, no memory"] = split, naive

    work = [encode_prompt(tokenizer, prompt) for prompt in (PROMPTS[:1] if context.quick else PROMPTS)]
    limit = 32 if context.quick else 96
    strict = compiler.compile_json_schema(SCHEMA, any_whitespace=False)
    model.generate(**work[0], max_new_tokens=4, do_sample=False)
    sampling = dict(do_sample=True, temperature=0.7, top_k=0, top_p=1.0)
    decoders: dict[str, Any] = {
        "plain generate": None,
        "XGrammar": XGrammar(strict),
        "XGrammar, jumps": XGrammar(strict, jump_forward=True, tokenizer=tokenizer),
    }
    for name, decoder in decoders.items():
        tokens = seconds = 0.0
        valid: list[float] = []
        for index, inputs in enumerate(work):
            context.report(f"{name}: prompts", index + 1, len(work))
            torch.manual_seed(context.seed)
            extra = {} if decoder is None else {"custom_generate": decoder}
            began = time.perf_counter()
            output = model.generate(**inputs, max_new_tokens=limit, **sampling, **extra)
            seconds += time.perf_counter() - began
            new = output[0, inputs["input_ids"].shape[1] :].tolist()
            tokens += len(new)
            if new[-1] in info.stop_token_ids:
                try:
                    jsonschema.validate(json.loads(tokenizer.decode(new, skip_special_tokens=True)), SCHEMA)
                    valid.append(1.0)
                except (ValueError, jsonschema.ValidationError):
                    valid.append(0.0)
        # arms finish different prompts, so these are not paired by prompt
        arms[name] = {"tokens per second": tokens / seconds, "valid of the finished": sum(valid) / max(len(valid), 1)}
        context.artifacts[name] = {"finished": len(valid), "valid": int(sum(valid)), "prompts": len(work)}
    return arms


REPRODUCTION = Reproduction(
    name="xgrammar",
    takes_weights=True,
    summary=(
        "masks along documents with and without the split, and the embedded model writing JSON freely, masked, and "
        "with jumps"
    ),
    run=run,
    claims=[
        Claim(
            "mask, any JSON, microseconds",
            "engine",
            "no split, no memory",
            "up to 100x",
            higher_is_better=False,
            why=WHY_MASK,
        ),
        Claim(
            "mask, schema, microseconds", "engine", "no split, no memory", "3x", higher_is_better=False, why=WHY_MASK
        ),
        Claim("tokens per second", "XGrammar", "plain generate", "near-zero overhead (about 1x)", why=WHY_END),
        Claim(
            "tokens per second",
            "XGrammar, jumps",
            "plain generate",
            "none given",
            why="Forced text takes one forward for many tokens.",
        ),
        Claim(
            "valid of the finished",
            "XGrammar",
            "plain generate",
            "all valid",
            kind="difference",
            why="Judged by the package jsonschema.",
        ),
    ],
    seeds=3,
    extra=("bench", "jsonschema"),
)
