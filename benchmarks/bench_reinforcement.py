"""A training step of every method of the reinforcement station against TRL's GRPO with the same settings, by turns in
one process; peak memory, each in a process of its own; and TEMPO's prefix tree against comparing all prefixes.

The model is a random Llama of 1.2M weights with a vocabulary of 4,096. Seconds are those of the process, on one
thread: other programs on the machine lengthen them little, and the shortest batch of an arm least, so the goals are for
the ratio of the shortest. Medians and the wall clock's ratio stand beside them. Every method is compared with GRPO
under the settings that it asks for; one that learns from texts, with GRPO on the prompts that it makes of them.
Rollouts nearly all have one length: the random policy ends at one token in 4,096.

Memory is what a process takes at its peak above what it held with the libraries loaded, for more and longer rollouts.
"""

from __future__ import annotations

import itertools
import os
import statistics
import tempfile
import time

ROWS, GROUP, NEW, STEPS, ROUNDS, VOCAB, PROMPT = 8, 8, 24, 4, 6, 4096, 32
MANY, LONG = 16, 48
"""Rollouts, and their tokens, where memory is measured."""
SECOND_PASS, MEMORY = 1.3, 1.1
"""Goals: of the step of methods that read full distributions or texts (1.05 for the others), and of the memory of all.
"""


def methods() -> dict:
    """Name -> settings of every method, by its card."""
    from everytoken.catalog import load_catalog
    from everytoken.reinforcement.training import is_method

    found = {}
    for card in load_catalog().values():
        if card.station != "reinforcement" or card.status == "planned" or not is_method(card.load()):
            continue
        if getattr(card.load(), "any_order", False):  # their rollouts are canvases
            continue
        # whole responses, and completions that no budget cuts: all arms write the same number of tokens
        same = {
            "segments": 1, "context": PROMPT, "budget_start": 2 * LONG, "budget_end": LONG, "budget_min": LONG,
            "budget_prompt": "{prompt}{budget}", "thinking_prompt": "{prompt}{budget}",
        }  # fmt: skip
        fields = card.load().__dataclass_fields__
        found[card.slug] = card.load()(**{name: value for name, value in same.items() if name in fields})
    return found


def rows_of(method, model, tokenizer) -> list[dict]:
    """Prompts of ``PROMPT`` tokens."""
    if not hasattr(method, "rows"):
        return [{"prompt": "abcdefgh" * (PROMPT // 8)}] * 64
    texts = ["abcdefgh" * (PROMPT // 4)] * 16
    return [row for row in method.rows(texts, model, tokenizer, 0) if row["position"] >= PROMPT]


def trainer_of(method, stock: bool, folder: str, updates: int, callback, rows: int = ROWS, new: int = NEW, steps=STEPS):
    """A trainer with the settings that a method asks for; ``steps`` batches of ``rows`` rollouts."""
    import torch
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from everytoken.reinforcement.trainer import RecipeTrainer
    from everytoken.testing.models import tiny_tokenizer
    from everytoken.training.quiet import without_printer

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, pad_token_id=1,
        )
    )  # fmt: skip
    model.generation_config.pad_token_id = 1

    def score(completion_ids, **_):
        return [float(sum(ids) % 2) for ids in completion_ids]

    arguments = method.arguments()
    weights = arguments.pop("reward_weights", None)
    if stock and weights is not None:  # a method's further rewards come with its recipe
        weights = None
    args = GRPOConfig(
        folder, max_steps=steps * updates, per_device_train_batch_size=rows, num_generations=GROUP,
        max_completion_length=new, num_iterations=updates, report_to=[], logging_strategy="no", save_strategy="no",
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True, reward_weights=weights, **arguments,
    )  # fmt: skip
    data = Dataset.from_list(rows_of(method, model, tiny_tokenizer()))
    common = dict(args=args, train_dataset=data, processing_class=tiny_tokenizer(), callbacks=[callback])
    if stock:
        if args.beta != 0:  # TRL loads its reference by a name
            model.name_or_path = model.config._name_or_path = folder
            model.save_pretrained(folder)
        return without_printer(GRPOTrainer(model, reward_funcs=score, **common))
    return without_printer(RecipeTrainer(model, recipe=method.recipe(), reward_funcs=score, **common))


def times_of(method, stock: bool, updates: int) -> list[tuple[float, float]]:
    """Seconds of the process and of the clock, of each batch of rollouts and its updates; the first is left out."""
    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append((time.process_time(), time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        trainer_of(method, stock, folder, updates, Clock()).train()
    ends = ends[updates - 1 :: updates]
    return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]


def memory(method, stock: bool) -> float:
    """Bytes at the peak of a process that trains, above what it held before.

    The process is a fork of this one, which must not have trained yet.
    """
    import resource

    from transformers import TrainerCallback

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with tempfile.TemporaryDirectory() as folder:
                trainer_of(method, stock, folder, 2, TrainerCallback(), MANY, LONG, 1).train()
            os.write(write, str(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as found:
        text = found.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("A process that measures memory failed.")
    return float(text)


def tree_rows() -> list[dict]:
    """64 rollouts of 4,096 tokens that share prefixes of all lengths; and every pair compared token by token."""
    import torch

    from everytoken.reinforcement.tempo import prefix_values

    rows, length = 64, 4096
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50_000, (rows, length), generator=draw)
    for row in range(1, rows):  # branches off an earlier one
        shared = int(torch.randint(0, length, (1,), generator=draw))
        ids[row, :shared] = ids[int(torch.randint(0, row, (1,), generator=draw)), :shared]
    mask = torch.ones_like(ids, dtype=torch.bool)
    rewards = torch.randint(0, 2, (rows,), generator=draw).float()

    def brute() -> torch.Tensor:
        """A prefix is shared where all its tokens are equal: [64, 64, 4096] at once."""
        same = (ids[:, None] == ids[None]).cumprod(-1)
        counts = same.sum(1)
        return (same * rewards[None, :, None]).sum(1) / counts

    assert torch.allclose(prefix_values(ids, mask, rewards)[0][:, 1:], brute().double(), atol=1e-5)
    found: dict[str, list[float]] = {"prefix tree": [], "all pairs of prefixes": []}
    for _ in range(7):
        for name, function in (
            ("prefix tree", lambda: prefix_values(ids, mask, rewards)),
            ("all pairs of prefixes", brute),
        ):
            began = time.process_time()
            function()
            found[name].append(time.process_time() - began)
    base = statistics.median(found["all pairs of prefixes"])
    return [
        {"arm": f"{name}, 64 rollouts of 4,096", "seconds a batch": statistics.median(values),
         "ratio": statistics.median(values) / base, "goal": 0.05 if name == "prefix tree" else ""}
        for name, values in found.items()
    ]  # fmt: skip


def main() -> None:
    import torch
    from transformers import TrainerCallback

    from common import report

    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    tried = methods()
    with tempfile.TemporaryDirectory() as folder:  # loads what trainers need
        for stock in (True, False):
            trainer_of(next(iter(tried.values())), stock, folder, 1, TrainerCallback())
    peaks = {(name, stock): memory(method, stock) for name, method in tried.items() for stock in (True, False)}
    rows: list[dict] = tree_rows()
    for name, method in tried.items():
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(ROUNDS):
            for stock in (True, False) if turn % 2 == 0 else (False, True):  # by turns: a slower machine slows both
                found[stock] += times_of(method, stock, 2)
        step, wall = ({stock: [value[i] for value in values] for stock, values in found.items()} for i in (0, 1))
        second = "distributions" in method.recipe().needs or method.recipe().of("auxiliary")
        rows.append(
            {
                "arm": f"{name} (against TRL's GRPO)",
                "seconds a batch": min(step[False]),
                "ratio": min(step[False]) / min(step[True]),
                "goal": SECOND_PASS if second else 1.05,
                "median, seconds": statistics.median(step[False]),
                "ratio of medians": statistics.median(step[False]) / statistics.median(step[True]),
                "ratio by the clock": statistics.median(wall[False]) / statistics.median(wall[True]),
                "memory ratio": peaks[name, False] / peaks[name, True],
                "memory goal": MEMORY,
            }
        )
    report(
        "reinforcement",
        rows,
        f"{ROWS} rollouts of {NEW} tokens, each used for two updates, {ROUNDS} rounds of {STEPS - 1} batches for "
        f"each arm by turns; seconds of the process on one thread, of the shortest batch; load of the machine at the "
        f"start {load:.1f}. Memory is the peak of a process that trains on {MANY} rollouts of {LONG} tokens, above "
        "what it held with the libraries loaded. TRL scores rollouts once here, as the old policy; methods that need "
        "entropies use those scores. UloRL counts responses that do not end as wrong, so none teaches here and its "
        "updates are nearly empty; D3S trains on a part; RMT also learns a text of 64 tokens in every update.",
    )


if __name__ == "__main__":
    main()
