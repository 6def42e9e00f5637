"""What networks of the station ``architectures`` cost, beside their peers in the same run.

*MrT5*: the encoder with a share of the bytes deleted, against the same encoder with all of them, at several lengths
(random weights, the width of a small model). *HAT*: its splitter on English prose and on text
that is not ASCII; a cached step of generation against a whole forward. *Lexinvariant*: a forward with drawn tables
against the same decoder with a table that is given. On one thread, in processor time; medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from common import report
from everytoken.architectures.hat.configuration_hat import HATConfig
from everytoken.architectures.hat.method import rows_of
from everytoken.architectures.hat.modeling_hat import HATForCausalLM
from everytoken.architectures.hat.splitter import split
from everytoken.architectures.lexinvariant.configuration_lexinvariant import LexinvariantConfig
from everytoken.architectures.lexinvariant.modeling_lexinvariant import LexinvariantForCausalLM
from everytoken.architectures.mrt5.configuration_mrt5 import MrT5Config
from everytoken.architectures.mrt5.modeling_mrt5 import MrT5Encoder
from everytoken.training.datasets.plain_text import example_text


def processor_seconds(function: Callable[[], Any], repeats: int = 5) -> float:
    """Median processor time of ``function``, after one call that warms up."""
    function()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return statistics.median(times)


def mrt5_rows() -> list[dict[str, Any]]:
    config = MrT5Config(
        vocab_size=384, d_model=512, d_kv=64, d_ff=1024, num_layers=6, num_heads=6, feed_forward_proj="gated-gelu",
        delete_gate_layer=2, is_decoder=False, use_cache=False,
    )  # fmt: skip
    encoder, rows = MrT5Encoder(config).eval(), []
    for length in (256, 512, 1024, 2048):
        ids = torch.randint(3, 259, (1, length))
        drawn = torch.rand(1, length)
        base = processor_seconds(lambda ids=ids: encoder(ids, delete_gate=torch.zeros(ids.shape)), 3)
        for share in (0.25, 0.5, 0.75):
            gate = torch.where(drawn < share, config.delete_gate_scale, 0.0)
            took = processor_seconds(lambda ids=ids, gate=gate: encoder(ids, delete_gate=gate), 3)
            rows.append({"part": "MrT5 encoder", "case": f"{length} bytes, {share:.0%} deleted", "seconds": took,
                         "peer": "nothing deleted", "peer seconds": base, "ratio": base / took})  # fmt: skip
    return rows


def hat_rows() -> list[dict[str, Any]]:
    prose = example_text()
    accents = prose.replace("e", "é")
    rows = []
    for name, text in (("English", prose), ("not ASCII", accents)):
        took = processor_seconds(lambda text=text: split(text), 3)
        speed = len(text.encode()) / took / 1e6
        rows.append({"part": "HAT splitter", "case": f"{name}, MB/s {speed:.2f}", "seconds": took})
    model = HATForCausalLM(HATConfig()).eval()
    inputs = rows_of([prose[1000:1600]])
    ids = inputs["input_ids"]
    cache = model(ids[:, :-1], use_cache=True).past_key_values
    step = processor_seconds(lambda: model(ids, past_key_values=cache))
    whole = processor_seconds(lambda: model(ids, logits_to_keep=1))
    rows.append({"part": "HAT step", "case": "600 bytes read", "seconds": step, "peer": "whole forward",
                 "peer seconds": whole, "ratio": whole / step})  # fmt: skip
    return rows


def lexinvariant_rows() -> list[dict[str, Any]]:
    rows = []
    for symbols in (27, 256):
        model = LexinvariantForCausalLM(LexinvariantConfig(vocab_size=symbols)).train()
        ids = torch.randint(0, symbols, (8, 256))
        table = model.table(torch.arange(8))
        drawn = processor_seconds(lambda model=model, ids=ids: model(ids))
        given = processor_seconds(lambda model=model, ids=ids, table=table: model(ids, symbol_table=table))
        rows.append({"part": "Lexinvariant forward", "case": f"{symbols} symbols, 8 x 256", "seconds": drawn,
                     "peer": "table given", "peer seconds": given, "ratio": given / drawn})  # fmt: skip
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [*mrt5_rows(), *hat_rows(), *lexinvariant_rows()]
    report("architectures", rows, "Processor time on one thread; a ratio above 1 is the gain over the peer.")


if __name__ == "__main__":
    main()
