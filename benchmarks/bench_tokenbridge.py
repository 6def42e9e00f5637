"""TokenBridge's sampler: the head with and without its cache, the nearest bin by two rules, and pictures by batch.

Without a cache the head reads the whole prefix at every channel, as the released code does: C (C + 1) / 2 passes of a
token in place of C. The released search holds all distances to the means; here the middles of the means are bisected.
On one thread, in processor time, so that other work on the machine does not count; the least of several runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from common import report
from everytoken.architectures.tokenbridge.configuration_tokenbridge import TokenBridgeConfig
from everytoken.architectures.tokenbridge.head import ChannelARHead
from everytoken.architectures.tokenbridge.modeling_tokenbridge import TokenBridgeModel
from everytoken.architectures.tokenbridge.quantizer import PostTrainingQuantizer


def milliseconds(function: Callable[[], Any], repeats: int) -> float:
    """Least processor time of several runs, after one that does not count."""
    function()
    least = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        function()
        least = min(least, time.process_time() - began)
    return 1e3 * least


def head_row(tokens: int, channels: int, repeats: int) -> dict[str, Any]:
    """Tokens of one iteration; both ways must draw the same."""
    torch.manual_seed(0)
    head = ChannelARHead(128, channels, 64, layers=2)
    g, numbers = torch.randn(tokens, 128), torch.rand(tokens, channels)
    cached, fresh = (head.sample(g, cache=cache, uniforms=numbers) for cache in (True, False))
    assert torch.equal(cached.codes, fresh.codes)
    ours, theirs = (
        milliseconds(lambda: head.sample(g, cache=cache, uniforms=numbers), repeats) for cache in (True, False)
    )
    what = f"head, {tokens} tokens of {channels} channels"
    return {"what": what, "ours, ms": ours, "the other way, ms": theirs, "times faster": theirs / ours}


def bins_row(repeats: int) -> dict[str, Any]:
    """Codes of 64 pictures of the paper's size."""
    quantizer, z = PostTrainingQuantizer(64), torch.randn(64, 256, 16)
    means = quantizer.centroids.float()

    def distances() -> torch.Tensor:
        return ((z * 0.6).clamp(-3, 3)[..., None] - means).abs().argmin(-1)

    assert float((distances() != quantizer.encode(z)).float().mean()) < 1e-5
    ours, theirs = milliseconds(lambda: quantizer.encode(z), repeats), milliseconds(distances, repeats)
    return {"what": "nearest of 64 bins", "ours, ms": ours, "the other way, ms": theirs, "times faster": theirs / ours}


def batch_row(batch: int, repeats: int) -> dict[str, Any]:
    """Pictures drawn together, against one after the other."""
    torch.manual_seed(0)
    config = TokenBridgeConfig(
        rows=4, columns=4, channels=8, num_classes=10, num_class_tokens=4, hidden_size=64, intermediate_size=128,
        num_attention_heads=4, num_hidden_layers=3, num_decoder_layers=2, head_width=64, head_layers=2, head_heads=4,
        channel_order=None,
    )  # fmt: skip
    model = TokenBridgeModel(config).eval()
    labels = list(range(10)) * (batch // 10 + 1)
    together = milliseconds(lambda: model.generate(labels[:batch], guidance=1.5), repeats) / batch
    alone = milliseconds(lambda: model.generate(labels[:1], guidance=1.5), repeats)
    what = f"a picture of {batch} drawn together"
    return {"what": what, "ours, ms": together, "the other way, ms": alone, "times faster": alone / together}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [head_row(*case, args.repeats) for case in ((1, 16), (64, 16), (1024, 16), (1024, 8))]
    rows += [bins_row(args.repeats), *(batch_row(batch, args.repeats) for batch in (1, 8, 64))]
    report("tokenbridge", rows, f"Least of {args.repeats}, one thread, processor time.")


if __name__ == "__main__":
    main()
