"""``everytoken tokenizer``: work on tokenizers and the models that use them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import BadInputError
from .common import stages
from .output import check_folder

app = typer.Typer(
    help="Put another tokenizer under a model, or train one whose tokens span words.", no_args_is_help=True
)
EXAMPLES = (
    "Examples:  everytoken tokenizer transplant --to mistral --out moved  ·  "
    "everytoken tokenizer transplant --model my-model --to ./my-tokenizer --out moved --strategy retok"
)


SUPERTOKENS = (
    "Examples:  everytoken tokenizer supertokens --data corpus.txt --out supertokens  ·  "
    "everytoken tokenizer supertokens --data a.txt --data b.txt --vocab-size 32000 --chunk-sizes 0.5,0.5 --out pairs"
)


@app.command(epilog=SUPERTOKENS)
def supertokens(
    data: Annotated[list[Path], typer.Option(help="Text files to train on; repeatable.")],
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens in all.")] = 16_000,
    chunk_sizes: Annotated[
        str, typer.Option(help="Probabilities that a chunk has 1, 2, 3... words.")
    ] = "0.4,0.3,0.2,0.1",
    min_frequency: Annotated[int, typer.Option(help="Least count of a merge.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a BPE tokenizer whose tokens may span several words, beside plain BPE of the same size."""
    from ..core.settings import read_text
    from ..core.vocabulary import token_bytes
    from ..tokenization.supertokens import SupertokenTrainer, words_in

    try:
        shares = [float(item) for item in chunk_sizes.split(",")]
    except ValueError as error:
        raise BadInputError(f"--chunk-sizes takes numbers with commas; got {chunk_sizes!r}.") from error
    trainer = SupertokenTrainer(vocab_size, shares, min_frequency, seed=seed, progress=True)
    check_folder(out, new=True)
    texts = []
    for path in data:
        texts += read_text(path).split("\n\n")
    held = texts[9::10] if len(texts) > 20 else texts
    training = [text for number, text in enumerate(texts) if len(texts) <= 20 or number % 10 != 9]
    tokenizer = trainer.train(training)
    plain = SupertokenTrainer(len(tokenizer), (1.0,), min_frequency).train(training)
    table = token_bytes(tokenizer)
    size = sum(len(text.encode()) for text in held)
    counts = [sum(map(len, item(held)["input_ids"])) for item in (tokenizer, plain)]
    tokenizer.save_pretrained(out)
    spanning = sum(words_in(token) > 1 for token in table)
    fewer = "" if len(tokenizer) >= vocab_size else f" of {vocab_size:,} (nothing more occurs {min_frequency} times)"
    print(
        f"{len(tokenizer):,} tokens{fewer}, {spanning:,} of them span words; {size / max(1, counts[0]):.2f} bytes per "
        f"token of {'held-out' if len(texts) > 20 else 'the training'} text, "
        f"plain BPE {size / max(1, counts[1]):.2f}; written to {out}"
    )


@app.command(epilog=EXAMPLES)
def transplant(
    to: Annotated[
        str,
        typer.Option(
            help="The new tokenizer: mistral, tekken, qwen, a file (ranks: FILE.tiktoken@FAMILY), a folder or a hub id."
        ),
    ],
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
    from ..core.loading import load_model, load_tokenizer
    from ..tokenization.carry import with_chat_template
    from ..tokenization.foreign_tokenizers import load_any_tokenizer
    from ..tokenization.tokenadapt import TokenAdapt

    console = Console(stderr=True)
    method = TokenAdapt(temperature, top_k, global_weight, strategy=strategy, seed=seed)
    check_folder(out, new=True)
    new = load_any_tokenizer(to)
    console.print("loading the model ...", style="dim")
    old, source = load_tokenizer(model), load_model(model, dtype=dtype)
    console.print(f"{len(old):,} tokens -> {len(new):,} tokens ...", style="dim", highlight=False)
    with stages(console) as report:
        fresh = method.transplant(source, old, new, report)
    new, note = with_chat_template(old, new)
    fresh.save_pretrained(out)
    new.save_pretrained(out)
    if note is not None:
        console.print(note, highlight=False)
    print(f"{method.summary().removesuffix('.')}; model and tokenizer written to {out}")
