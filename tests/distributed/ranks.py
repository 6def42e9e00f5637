"""What ranks run in processes of their own; each returns differences from one process alone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from everytoken.core.errors import BadInputError
from everytoken.distributed.fused_norm import all_reduce_add_norm, own_rows, reduce_add_norm
from everytoken.distributed.token_weave import Request, TokenWeave, weave

ROWS = (1, 2, 3, 7, 1025)


def llama(heads=12, kv=12, hidden=48, inner=96, layers=2, seed=0, **settings):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=61, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=4096, initializer_range=0.2,
        pad_token_id=0, bos_token_id=0, eos_token_id=None, **settings,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids_of(rows, count, seed=1):
    return torch.randint(1, 61, (rows, count), generator=torch.Generator().manual_seed(seed))


def operation(mesh):
    """The one operation against all-reduce, residual and norm: value, and gradient against one process."""
    group, world, rank = mesh.get_group(), mesh.size(), mesh.get_rank()
    norm = torch.nn.RMSNorm(24, eps=1e-5)
    found = {}
    for count in ROWS:
        generator = torch.Generator().manual_seed(count)
        parts = torch.randn(world, count, 24, generator=generator)
        residual = torch.randn(count, 24, generator=generator)
        weights = torch.randn(world, count, 24, generator=generator)  # of each rank's loss
        gain = torch.rand(24, generator=generator) + 0.5
        with torch.no_grad():
            norm.weight.copy_(gain)
            ours, held = reduce_add_norm(parts[rank], own_rows(residual, group), norm, group)
            theirs, whole = all_reduce_add_norm(parts[rank], residual, norm, group)
        value = max((ours - theirs).abs().max().item(), (held - own_rows(whole, group)).abs().max().item())
        with torch.no_grad():
            same, _ = reduce_add_norm(theirs, own_rows(residual, group), norm, group, reduce=False)
            value = max(value, (same - norm(residual + theirs)).abs().max().item())

        mine = parts[rank].clone().requires_grad_()
        norm.weight.grad = None
        (reduce_add_norm(mine, own_rows(residual, group), norm, group)[0] * weights[rank]).sum().backward()
        dist.all_reduce(norm.weight.grad, group=group)
        ours_gain = norm.weight.grad.clone()
        alone = parts.clone().requires_grad_()
        norm.weight.grad = None
        (norm(residual + alone.sum(0)) * weights).sum().backward()
        gradient = (mine.grad - alone.grad[rank]).abs().max().item()
        found[str(count)] = [value, gradient, (ours_gain - norm.weight.grad).abs().max().item()]
    try:
        reduce_add_norm(parts[rank], residual[:3], norm, group)
    except BadInputError:
        return found
    raise AssertionError("a residual of other rows was taken")


def forwards(mesh, counts, heads=12, kv=12, settings=None):
    """Logits of every cut and schedule, of padded batches and of mixed steps, against one process."""
    alone = llama(heads, kv, **(settings or {}))
    woven = weave(llama(heads, kv, **(settings or {})), mesh)
    far = {}

    def differ(name, ours, theirs):  # as a share of the largest
        far[name] = max(far.get(name, 0.0), (ours - theirs).abs().max().item() / theirs.abs().max().item())

    with torch.no_grad():
        for count in counts:
            ids = ids_of(1, count)
            wanted = alone(ids).logits
            for first in sorted({1, count // 3, count - 1}):
                woven.settings = TokenWeave(first=first)
                differ("cuts", woven.model(ids).logits, wanted)
            for schedule in ("fused", "plain"):
                woven.settings = TokenWeave(schedule)
                differ(schedule, woven.model(ids).logits, wanted)
        ids, mask = ids_of(3, 17), torch.ones(3, 17, dtype=torch.long)
        mask[1, :5] = 0
        wanted = alone(ids, attention_mask=mask).logits
        for first in (16, 17, 20):
            woven.settings = TokenWeave(first=first)
            differ("batches", woven.model(ids, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
        for first in (1, 8):  # two prompts and a token, each behind what was read
            woven.settings = TokenWeave(first=3)
            caches = [DynamicCache() for _ in range(3)]
            before, new = (5, 9, 4), (6, 1, 5)
            texts = [ids_of(1, b + n, seed)[0] for seed, (b, n) in enumerate(zip(before, new, strict=True))]
            woven.step([Request(t[:b], c) for t, b, c in zip(texts, before, caches, strict=True)])
            woven.settings = TokenWeave(first=first)
            found = woven.step([Request(t[b:], c) for t, b, c in zip(texts, before, caches, strict=True)])
            for text, count, ours in zip(texts, new, found, strict=True):
                differ("mixed steps", ours, alone(text[None]).logits[0, -count:])
    asked = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    woven.settings = TokenWeave(first=2)
    greedy = torch.equal(alone.generate(ids, **asked), woven.model.generate(ids, **asked))
    return {"far": far, "greedy": greedy, "cut": woven.reduce, "woven": woven.steps.woven}


def refusals(mesh):
    """What a mesh does not fit, by its message; before any weight is cut."""
    found = []
    for settings in ({"inner": 95},):
        model = llama(**settings)
        try:
            weave(model, mesh)
        except BadInputError as error:
            found.append(str(error))
        assert all(type(item) is torch.nn.Parameter for item in model.parameters())
    model = llama()
    weave(model, mesh).remove()
    try:
        weave(model, mesh)
    except Exception as error:
        found.append(str(error))
    woven = weave(llama(), mesh)
    cache = DynamicCache()
    llama()(ids_of(1, 4), past_key_values=cache)
    try:
        woven.model(ids_of(1, 4), past_key_values=cache)
    except BadInputError as error:
        found.append(str(error))
    return found


def everything(mesh, counts):
    """All of the above in one start of processes."""
    found = {
        "operation": operation(mesh),
        "forwards": forwards(mesh, counts, settings={"attention_bias": True, "mlp_bias": True}),
        "refusals": refusals(mesh),
    }
    if mesh.size() == 2:
        found["replicated"] = forwards(mesh, [65], 9, 3, {"hidden": 54})
    return found
