"""``everytoken serve``: an OpenAI-compatible server over any model, with this package's decoders and grammars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..core.errors import BadInputError, require

EXAMPLES = (
    "Examples:  everytoken serve  ·  everytoken serve --model Qwen/Qwen3-0.6B --decoder dyspec --set budget=16  ·  "
    "EVERYTOKEN_API_KEY=... everytoken serve --host 0.0.0.0"
)
KEY = "EVERYTOKEN_API_KEY"


def serve(
    model: Annotated[str | None, typer.Option(help="A folder or a hub id; default the embedded model.")] = None,
    decoder: Annotated[str | None, typer.Option(help="The decoder that writes; default transformers' own.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting of the decoder, key=value.")] = None,
    host: Annotated[str, typer.Option(help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; default the folder's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one answer at most.")] = 1024,
    waiting: Annotated[int, typer.Option(min=1, help="Requests inside at once; beyond them a client gets 429.")] = 256,
    request_decoders: Annotated[
        bool,
        typer.Option(
            help="Let requests name a decoder, whose settings may name files and models: trusted clients only."
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="The weights' type: auto, float32, bfloat16, float16.")] = "auto",
) -> None:
    """Serve a model to any OpenAI client: JSON schemas, tools, regular expressions, grammars, log-probabilities.

    Clients must send the key of the environment variable EVERYTOKEN_API_KEY where it is set. Without a key the server
    listens on this machine only.
    """
    require("starlette", "serve", "everytoken serve")
    require("uvicorn", "serve", "everytoken serve")
    import uvicorn

    from ..core.loading import load_model, load_tokenizer
    from ..serving.app import Server, make_app
    from ..serving.decoders import make_decoder
    from ..serving.engine import Engine

    key = os.environ.get(KEY)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise BadInputError(f"Listening on {host} lets others use this machine.", f"Set {KEY} to a long random text.")
    if settings and decoder is None:
        raise BadInputError("--set is of a decoder, and none is named.", "Add --decoder NAME.")
    pairs = dict(pair.partition("=")[::2] for pair in settings or [])
    writer = None if decoder is None else make_decoder(decoder, pairs)  # a wrong name or setting, before weights load
    loaded = load_model(model, dtype=dtype)
    engine = Engine(loaded, load_tokenizer(model), writer, most_tokens=max_tokens, per_request=request_decoders)
    shown = name or (Path(model).name if model else "embedded")
    server = Server(engine, shown, waiting, key)
    Console(stderr=True).print(f"serving {shown} on http://{host}:{port}/v1", highlight=False)
    uvicorn.run(make_app(server), host=host, port=port, log_level="warning", timeout_keep_alive=30)
