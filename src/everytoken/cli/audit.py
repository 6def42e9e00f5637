"""``everytoken audit``: commit to hidden tokens that are billed, and audit them, as services or by one command."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..core.errors import BadInputError, EverytokenError, require
from ..core.settings import read_text
from .common import build_settings, stages
from .output import check_files, print_json

if TYPE_CHECKING:
    from ..audit.base import Embedder
    from ..audit.coin import CoIn, Report
    from ..audit.verifier import Verifier

app = typer.Typer(
    no_args_is_help=True,
    help="Audit hidden tokens that are billed: commitments, challenges, a verifier of embeddings, reports.",
    epilog="Examples:  everytoken audit train --out verifier.json  ·  everytoken audit provide --jobs jobs.jsonl  ·  "
    "everytoken audit verify http://127.0.0.1:8300 --job job-1 --texts job.json --public-key 3f...",
)
Settings = Annotated[list[str] | None, typer.Option("--set", help="A setting of coin, key=value; repeatable.")]
EmbedderName = Annotated[str, typer.Option("--embedder", help="hashed-words (needs no model) or all-MiniLM-L6-v2.")]
VerifierFile = Annotated[Path | None, typer.Option("--verifier", help="A trained verifier; without one, proofs alone.")]
PublicKey = Annotated[str, typer.Option("--public-key", help="The provider's, 64 hexadecimal digits.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


def _embedder(name: str) -> Embedder:
    from ..audit.base import HashedWords, MiniLM
    from ..core.embedding import require_embedder

    if name == "hashed-words":
        return HashedWords()
    if name != "all-MiniLM-L6-v2":
        raise BadInputError(f"An embedder is hashed-words or all-MiniLM-L6-v2; got {name!r}.")
    require_embedder("Auditing with MiniLM")
    return MiniLM()


def _settings(pairs: list[str] | None) -> CoIn:
    from ..audit.coin import CoIn

    return CoIn(**build_settings("coin", pairs or []))


def _verifier(path: Path | None) -> Verifier | None:
    from ..audit.verifier import Verifier

    return None if path is None else Verifier.load(path)


def _key(text: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise BadInputError("A public key has 64 hexadecimal digits.", "`everytoken audit provide` prints it.")
    return key


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The verifier's file.")] = Path("verifier.json"),
    data: Annotated[Path | None, typer.Option(help="Texts, apart by empty lines; default: prose of Python's.")] = None,
    jobs: Annotated[int, typer.Option(min=8, help="Jobs to cut from them.")] = 120,
    length: Annotated[int, typer.Option(min=16, help="Hidden words of a job.")] = 160,
    embedder: EmbedderName = "hashed-words",
    settings: Settings = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train and calibrate a verifier on texts and on attacks on them."""
    from ..audit.attacks import Remembered, example_documents, jobs_of, trained

    check_files(out)
    documents = (
        example_documents() if data is None else [part for part in read_text(data).split("\n\n") if part.strip()]
    )
    chosen, made = _settings(settings), jobs_of(documents, jobs, length, seed)
    with stages(Console(stderr=True)) as report:
        verifier = trained(Remembered(_embedder(embedder)), chosen, made, seed, report=report)
    verifier.save(out)
    print(f"a {verifier.kind} verifier of {jobs} jobs, {verifier.embedder}, written to {out}")


@app.command()
def provide(
    jobs: Annotated[Path, typer.Option(help="JSONL: job, prompt, answer and tokens (a list of texts) a line.")],
    key: Annotated[Path, typer.Option(help="The private key's file; made, readable by you alone, if missing.")] = Path(
        "provider.key"
    ),
    port: Annotated[int, typer.Option(help="On 127.0.0.1.")] = 8300,
    embedder: EmbedderName = "hashed-words",
    settings: Settings = None,
    calls: Annotated[int, typer.Option(min=1, help="Requests a minute at most.")] = 600,
) -> None:
    """Commit to jobs and answer audits over HTTP."""
    require("uvicorn", "agents", "Serving audits")
    import uvicorn

    from ..audit.provider import Provider
    from ..audit.services import provider_service
    from ..core.rate import RateLimit

    chosen = _settings(settings)
    provider = Provider(_embedder(embedder), private_key(key), chosen.block, chosen.exposure)
    for number, line in enumerate(read_text(jobs).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts, tokens = [row[name] for name in ("job", "prompt", "answer")], row["tokens"]
            if not all(isinstance(item, str) for item in [*texts, *tokens]) or not isinstance(tokens, list):
                raise TypeError("texts were expected")
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{jobs}, line {number}: no job ({error}).", "Name job, prompt, answer, tokens."
            ) from error
        provider.commit(texts[0], texts[1], texts[2], tokens)
    print(f"public key: {provider.public_key.hex()}", flush=True)
    uvicorn.run(provider_service(provider, RateLimit(calls, 60.0)), host="127.0.0.1", port=port, log_level="warning")


def private_key(path: Path) -> Any:
    """The Ed25519 key of a file; made with access for its owner alone where there is none.

    Raises:
        BadInputError: the file holds no key.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if not path.exists():
        made = Ed25519PrivateKey.generate()
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(made.private_bytes_raw().hex())
        return made
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(read_text(path).strip()))
    except ValueError as error:
        raise BadInputError(f"{path} holds no private key.") from error


@app.command()
def verify(
    url: Annotated[str, typer.Argument(help="The provider's service.")],
    job: Annotated[str, typer.Option(help="The job's id.")],
    texts: Annotated[Path, typer.Option(help="JSON with the prompt and the answer that you sent and got.")],
    public_key: PublicKey,
    verifier: VerifierFile = None,
    embedder: EmbedderName = "hashed-words",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="Write the report, which can be checked again offline.")] = None,
    as_json: AsJson = False,
) -> None:
    """Audit one job of a provider; ends with 1 where it is inflated or the audit failed."""
    from ..audit.coin import Auditor
    from ..audit.services import RemoteProvider
    from ..core.files import write_text_whole

    check_files(out)
    try:
        given = json.loads(read_text(texts))
        prompt, answer = given["prompt"], given["answer"]
        if not isinstance(prompt, str) or not isinstance(answer, str):
            raise TypeError("texts were expected")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{texts} holds no prompt and answer ({error}).") from error
    auditor = Auditor(_embedder(embedder), _key(public_key), _verifier(verifier), _settings(settings))
    report = auditor.audit(RemoteProvider(url), job, prompt, answer)
    if out is not None:
        write_text_whole(out, json.dumps(report.message()))
    _show(report, as_json)


@app.command()
def recheck(
    report: Annotated[Path, typer.Argument(help="A report that `verify --out` wrote.")],
    public_key: PublicKey,
    verifier: VerifierFile = None,
    embedder: EmbedderName = "hashed-words",
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check a report again, offline."""
    from ..audit.coin import recheck as again

    _show(again(report, _embedder(embedder), _key(public_key), _verifier(verifier), _settings(settings)), as_json)


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print_json({name: value for name, value in report.message().items() if name != "transcript"})
    else:
        print(f"{report.verdict} (confidence {report.confidence:.3f}): {report.reason}")
        print(f"{report.count:,} hidden tokens billed, {report.opened:,} opened in {report.rounds} rounds")
    if report.verdict in ("inflated", "failed"):
        raise EverytokenError(f"The audit of {report.job} ended as {report.verdict}.")
