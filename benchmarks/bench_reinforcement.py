"""A training step of every method of the reinforcement station against TRL's GRPO with the same settings, by turns in
one process; peak memory, each in a process of its own; and TEMPO's prefix tree against comparing all prefixes.

The model is a random Llama of 3M weights with a vocabulary of 4,096. Seconds are those of the process, on one thread:
other programs on the machine lengthen them little. The wall clock's ratio stands beside them. Every method is compared
with GRPO under the settings that it asks for. Rollouts have one length in all arms: no policy may end.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time

ROWS, GROUP, NEW, STEPS, ROUNDS, VOCAB = 8, 8, 24, 4, 2, 4096
SECOND_PASS, MEMORY = 1.3, 1.1
"""Goals: of the step of methods that read full distributions (1.05 for the others), and of the peak memory of all."""


def methods() -> dict:
    """Name -> settings of every method that learns from prompts, by its card."""
    from everytoken.catalog import load_catalog
    from everytoken.reinforcement.training import is_method

    found = {}
    for card in load_catalog().values():
        if card.station != "reinforcement" or card.status == "planned" or not is_method(card.load()):
            continue
        # whole responses, and completions that no budget cuts: all arms write the same number of tokens
        same = {"segments": 1, "budget_prompt": "{prompt}{budget}", "budget_start": 4 * NEW, "budget_end": 2 * NEW}
        fields = card.load().__dataclass_fields__
        method = card.load()(**{name: value for name, value in same.items() if name in fields})
        if not hasattr(method, "rows"):
            found[card.slug] = method
    return found


def trainer_of(method, stock: bool, folder: str, updates: int, callback):
    """A trainer with the settings that a method asks for."""
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
            vocab_size=VOCAB, hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
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
        folder, max_steps=STEPS * updates, per_device_train_batch_size=ROWS, num_generations=GROUP,
        max_completion_length=NEW, num_iterations=updates, report_to=[], logging_strategy="no", save_strategy="no",
        bf16=False, gradient_checkpointing=False, disable_tqdm=True, use_cpu=True, reward_weights=weights, **arguments,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "abcdefgh" * 4}] * 64)
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


def peak(name: str, stock: bool) -> float:
    """The peak resident memory of a process that trains, in bytes."""
    run = subprocess.run([sys.executable, __file__, name, str(int(stock))], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        raise SystemExit(run.stderr[-3000:])
    return json.loads(lines[-1][6:])


def one(name: str, stock: bool) -> None:
    import resource

    times_of(methods()[name], stock, 2)
    print("RESULT" + json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


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
    import os

    import torch

    from common import report

    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    rows: list[dict] = tree_rows()
    for name, method in methods().items():
        found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for turn in range(ROUNDS):
            for stock in (True, False) if turn % 2 == 0 else (False, True):  # by turns: a slower machine slows both
                found[stock] += times_of(method, stock, 2)
        step, wall = (
            {stock: statistics.median(v[i] for v in values) for stock, values in found.items()} for i in (0, 1)
        )
        wide = "distributions" in method.recipe().needs
        memory = {stock: peak(name, stock) for stock in (True, False)}
        rows.append(
            {
                "arm": f"{name} (against TRL's GRPO)",
                "seconds a batch": step[False],
                "ratio": step[False] / step[True],
                "ratio by the clock": wall[False] / wall[True],
                "goal": SECOND_PASS if wide else 1.05,
                "memory ratio": memory[False] / memory[True],
                "memory goal": MEMORY,
            }
        )
    report(
        "reinforcement",
        rows,
        f"{ROWS} rollouts of {NEW} tokens, each used for two updates, {ROUNDS} rounds of {STEPS - 1} batches for "
        f"each arm by turns, medians; one thread; load of the machine at the start {load:.1f}. Memory is the peak of a "
        "process that trains. TRL scores rollouts once here, as the old policy; methods that need entropies use those "
        "scores. UloRL counts responses that do not end as wrong, so none teaches here and its updates are nearly "
        "empty; D3S trains on a part.",
    )


if __name__ == "__main__":
    one(sys.argv[1], sys.argv[2] == "1") if len(sys.argv) > 1 else main()
