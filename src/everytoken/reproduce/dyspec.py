"""DySpec's claims: more tokens a second than plain decoding, and longer accepted paths than fixed trees of the same
size.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ..core.scoring import encode_prompt
from .base import Arms, Claim, Context, Reproduction

if TYPE_CHECKING:
    from ..generation.dyspec import DySpec
    from ..generation.speculative.trees import TokenTree

PROMPTS = [
    "Write a short letter to a friend who has just moved to another country.",
    "Explain why the sky is blue in simple words.",
    "Give me a recipe for vegetable soup with clear steps.",
    "What should I pack for a three day trip to the seaside?",
    "Write a Python function that checks whether a word is a palindrome.",
    "Summarise the plot of Romeo and Juliet.",
    "List the planets of the solar system with one fact about each.",
    "Translate 'good morning, how are you?' into French, Spanish and German.",
    "How can I improve my concentration while studying?",
    "Tell me a story about a fox who wanted to learn to read.",
]
WHY_SPEED = (
    "The paper's 9.1x is a 70B target offloaded to CPU memory, where a forward over hundreds of nodes costs what one "
    "token costs; a 135M target on two cores pays 1.35x for 8 tokens and 1.7x for 16, which bounds the gain and the "
    "useful budget, and the shipped draft was trained for 44 minutes on 2 cores."
)
WHY_PACKED = (
    "All arms but this one run the weights in the way that is the fastest on the machine (the result file names it; "
    "packed for the CPU where it names none), which speeds plain decoding up as well; against transformers as it "
    "comes, both gains multiply."
)
PLAIN = ("plain generate", "plain, lean loop", "plain generate, linears not packed")
WHY_SHAPE = "Same draft and number of nodes; the paper compares with Sequoia and SpecInfer trees on 7B models."


def kary_decoder(draft: Any, branching: tuple[int, ...]) -> DySpec:
    """A DySpec whose tree has a fixed shape: every node of depth i has ``branching[i]`` children."""
    from ..generation.dyspec import DySpec

    @dataclass
    class FixedTree(DySpec):
        def grow(self, tree: TokenTree, expand: Any, budget: int, max_depth: int, sampling: bool) -> TokenTree:
            layer = [0]
            for width in branching[:max_depth]:
                following = []
                for node, (tokens, probs) in zip(layer, expand(layer), strict=True):
                    following += [tree.add(t, node, p) for t, p in zip(tokens[:width], probs[:width], strict=True)]
                layer = following
                if len(tree) > budget:
                    break
            return tree

    size = sum(int(torch.tensor(branching[: i + 1]).prod()) for i in range(len(branching)))
    return FixedTree(draft, budget=size, threshold=None, adaptive=False)  # always all of its nodes


def fastest_plain(arms: Arms) -> str:
    """The arm of plain decoding that wrote the most tokens a second, by the median of its prompts."""

    def speed(name: str) -> float:
        found = arms[name]["tokens per second"]  # one number a prompt, or their mean
        return median(found if isinstance(found, list) else [found])

    return max((name for name in PLAIN if name in arms), key=speed)


def run(context: Context) -> Arms:
    from ..core.loading import load_model, load_tokenizer
    from ..decoding.plain import PlainDecoding
    from ..generation.dyspec import DySpec
    from ..generation.speculative import load_draft

    tokenizer = load_tokenizer(context.model)
    model, untouched = context.load_model("auto", compiled=True), load_model(context.model)
    draft, follower = load_draft(model), load_draft(model)
    new_tokens = 24 if context.quick else 64
    prompts = PROMPTS[:3] if context.quick else PROMPTS
    work = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sampling = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    arms: dict[str, tuple[Any, dict[str, Any]]] = {
        "plain generate": (lambda: None, {}),
        "plain, lean loop": (PlainDecoding, {}),
        "plain generate, linears not packed": (lambda: None, {}),
        "assisted generation": (lambda: None, {}),
        "prompt lookup": (lambda: None, {"prompt_lookup_num_tokens": 8}),
        "DySpec": (lambda: DySpec(draft), {}),
        "chain of 14": (lambda: DySpec(draft, 14, None, max_children=1, max_depth=14, adaptive=False), {}),
        "2-ary tree of 14": (lambda: kary_decoder(draft, (2, 2, 2)), {}),
        "DySpec of 14": (lambda: DySpec(draft, 14, None, max_depth=14, adaptive=False), {}),
        "DySpec sampling": (lambda: DySpec(draft), sampling),
        "plain sampling": (lambda: None, sampling),
    }
    results: Arms = {}
    greedy: dict[str, list[list[int]]] = {}
    model.generate(**work[0], max_new_tokens=8, do_sample=False)  # warm up
    for name, (build, extra) in arms.items():
        speeds: list[float] = []  # one value a prompt
        lengths: list[float] = []
        texts = []
        for index, inputs in enumerate(work):
            context.report(f"{name}: prompts", index + 1, len(work))
            decoder = build()
            arguments = dict(do_sample=False) | extra
            if decoder is not None:
                arguments["custom_generate"] = decoder
            if name == "assisted generation":
                arguments["assistant_model"] = follower.attach(model, follow=True)
            began = time.perf_counter()
            target = untouched if "not packed" in name else model
            output = target.generate(**inputs, max_new_tokens=new_tokens, **arguments)
            seconds = time.perf_counter() - began
            follower.detach_target()
            new = output[0, inputs["input_ids"].shape[1] :].tolist()
            speeds.append(len(new) / seconds)
            texts.append(new)
            if isinstance(decoder, DySpec):
                lengths.append(decoder.stats.accepted / max(decoder.stats.rounds, 1))
        results[name] = {"tokens per second": speeds}
        if lengths:
            results[name]["mean accepted length"] = lengths
        if not arguments["do_sample"]:
            greedy[name] = texts
    same = {
        name: sum(a == b for a, b in zip(texts, greedy["plain generate"], strict=True))
        for name, texts in greedy.items()
    }
    fastest = context.artifacts["fastest plain arm"] = fastest_plain(results)
    results["fastest plain"] = results[fastest]
    context.artifacts["texts equal to plain greedy decoding"] = same
    context.artifacts["settings"] = {"new_tokens": new_tokens, "prompts": len(prompts), "budget": DySpec().budget}
    return results


REPRODUCTION = Reproduction(
    name="dyspec",
    summary="ten varied prompts, 64 new tokens: plain, assisted, prompt lookup, and DySpec with the shipped draft",
    run=run,
    takes_weights=True,
    claims=[
        Claim("tokens per second", "DySpec", "fastest plain", "up to 9.1x", why=WHY_SPEED),
        Claim("tokens per second", "DySpec", "plain generate, linears not packed", "none given", why=WHY_PACKED),
        Claim(
            "tokens per second",
            "DySpec",
            "assisted generation",
            "none given",
            why="The same draft, as a chain, in transformers' own loop.",
        ),
        Claim(
            "tokens per second",
            "DySpec",
            "prompt lookup",
            "none given",
            why="Drafts copied from the prompt; needs repetitive text.",
        ),
        Claim("tokens per second", "DySpec sampling", "plain sampling", "up to 6.21x", why=WHY_SPEED),
        Claim("mean accepted length", "DySpec of 14", "chain of 14", "higher", why=WHY_SHAPE),
        Claim("mean accepted length", "DySpec of 14", "2-ary tree of 14", "higher", why=WHY_SHAPE),
    ],
    seeds=3,
)
