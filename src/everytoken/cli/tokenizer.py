"""``everytoken tokenizer``: work on tokenizers and the models that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import BadInputError

app = typer.Typer(help="Put another tokenizer under a model.", no_args_is_help=True)
EXAMPLES = (
    "Examples:  everytoken tokenizer transplant --to mistral --out moved  ·  "
    "everytoken tokenizer transplant --model my-model --to ./my-tokenizer --out moved --strategy retok"
)


@app.command(epilog=EXAMPLES)
def transplant(
    to: Annotated[str, typer.Option(help="The new tokenizer: mistral, tekken, qwen, a file, a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="Folder for the model and its new tokenizer.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id, folder or .gguf file; default: the embedded model.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="tokenadapt, or a baseline: retok, mean, random.")] = "tokenadapt",
    global_weight: Annotated[float, typer.Option(help="Share of the estimate from the nearest old tokens.")] = 0.3,
    temperature: Annotated[float, typer.Option(help="Of the weights.")] = 0.3,
    top_k: Annotated[int, typer.Option(help="Nearest old tokens.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Give a model another tokenizer: embeddings of shared tokens are kept, the others estimated (TokenAdapt)."""
    from ..core.loading import check_writable, load_model, load_tokenizer
    from ..tokenization.families import load_any_tokenizer
    from ..tokenization.tokenadapt import TokenAdapt

    console = Console(stderr=True)
    method = TokenAdapt(temperature, top_k, global_weight, strategy=strategy, seed=seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInputError(f"{out} exists already.", "Choose a new folder.")
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out)
    new = load_any_tokenizer(to)
    console.print("loading the model ...", style="dim")
    old, source = load_tokenizer(model), load_model(model, dtype=dtype)
    console.print(f"{len(old):,} tokens -> {len(new):,} tokens ...", style="dim", highlight=False)
    fresh = method.transplant(source, old, new)
    fresh.save_pretrained(out)
    new.save_pretrained(out)
    assert method.mixture is not None
    copied, made = int((method.mixture.copied >= 0).sum()), len(method.mixture.rows)
    print(f"{copied:,} rows copied, {made:,} made; model and tokenizer written to {out}")
