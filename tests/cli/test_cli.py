"""The command line, within this process; ``test_processes.py`` starts each verb as a shell does."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from everytoken.catalog import load_catalog
from everytoken.cli.app import app, main
from everytoken.cli.common import build_trial, watched
from everytoken.cli.output import HANDLER, any_encoding
from everytoken.cli.try_ import _save
from everytoken.core.trace import TokenTrace

from .common import run

RUNNER = CliRunner()


# -- papers -----------------------------------------------------------------------------------------------------------
def test_papers_lists_searches_and_filters():
    everything = json.loads(RUNNER.invoke(app, ["papers", "--json"]).stdout)
    assert [card["slug"] for card in everything] and len(everything) == len(load_catalog())
    some = json.loads(RUNNER.invoke(app, ["papers", "--station", "preference", "--json"]).stdout)
    assert {card["station"] for card in some} == {"preference"}
    assert all(
        card["year"] == 2023 for card in json.loads(RUNNER.invoke(app, ["papers", "--year", "2023", "--json"]).stdout)
    )
    done = json.loads(RUNNER.invoke(app, ["papers", "--status", "measured", "--json"]).stdout)
    assert {"stochastok", "dyspec", "tdpo"} <= {card["slug"] for card in done}
    for arguments in (
        ["papers", "speculative", "tree", "--words", "--json"],
        ["papers", "--words", "--json", "speculative tree"],
    ):
        assert "dyspec" in [card["slug"] for card in json.loads(RUNNER.invoke(app, arguments).stdout)][:3]
    assert "dyspec" in RUNNER.invoke(app, ["papers", "dyspec", "--words"]).stdout
    for flags in (["--words"], []):  # by meaning, too, something can have nothing in common with all papers
        nothing = RUNNER.invoke(app, ["papers", *flags, "pizza recipe"])
        assert nothing.exit_code == 1 and "No paper matches 'pizza recipe'" in nothing.stdout
    runs = json.loads(RUNNER.invoke(app, ["papers", "--status", "implemented", "--json"]).stdout)
    assert {card["slug"] for card in done} < {card["slug"] for card in runs} or done == runs
    assert all(card["implementation"] for card in runs)
    many = json.loads(RUNNER.invoke(app, ["papers", "--words", "--limit", "15", "--json", "token"]).stdout)
    assert len(many) == 15


def test_names_of_papers_are_whole_in_80_columns():
    """They are there to be copied."""
    listed = run("papers", COLUMNS="80").stdout
    for card in load_catalog().values():
        assert re.search(rf"^{re.escape(card.slug)} .*\b{card.year}\b.*\b{card.status}\b", listed, re.M), card.slug


def test_papers_show():
    text = RUNNER.invoke(app, ["papers", "show", "tdpo"]).stdout
    for piece in ("Token-level Direct Preference", "2404.11999", "everytoken try tdpo", "measured"):
        assert piece in text
    card = json.loads(RUNNER.invoke(app, ["papers", "show", "2404.11999", "--json"]).stdout)
    assert card["slug"] == "tdpo"


@pytest.mark.parametrize(
    "verb",
    [
        [],
        ["papers"],
        ["papers", "show"],
        ["try"],
        ["compare"],
        ["data"],
        ["data", "sentiment"],
        ["train"],
        ["reproduce"],
        ["scoreboard"],
        ["doctor"],
    ],
)
def test_help_has_real_examples(verb):
    result = RUNNER.invoke(app, [*verb, "--help"])
    assert result.exit_code == 0
    if verb != ["papers", "show"]:
        assert "everytoken " in result.stdout


# -- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["try", "dispec"], "Did you mean dyspec", 2),
        (["try", "dyspec", "--set", "buget=3"], "Did you mean budget", 2),
        (["try", "dyspec", "--set", "budget=-3"], "budget >= 0", 2),
        (["try", "dyspec", "--set", "budget"], "key=value", 2),
        (["try", "dyspec", "--prompt", "  "], "prompt is empty", 2),
        (["try", "dyspec", "--peer", "vllm"], "no peer", 2),
        (["try", "dyspec", "--weights", "int3"], "Unknown weights", 2),
        (["reproduce", "dyspec", "--weights", "int3", "--out", "."], "Unknown weights", 2),
        (["reproduce", "stochastok", "--weights", "int4", "--out", "."], "a way of its own", 2),
        (["try", "dyspec", "--trace", "/no/such/folder/x.html"], "does not exist", 2),
        (["try", "dyspec", "--model", "./absent"], "no folder or file", 2),
        (["try", "dyspec", "--model", "nobody/absent"], "embedded", 1),
        (["try", "daily-papers"], "not a method that can be tried", 2),
        (["try", "sphinx-v"], "not implemented yet", 2),
        (["try", "xgrammar", "--schema", "absent.json"], "no file absent.json", 2),
        (["try", "xgrammar", "--schema", '{"type": "strin'], "line 1, column", 2),
        (["try", "xgrammar", "--schema", '{"properties": {"a": {"type": "strng"}}}'], "#/properties/a/type", 2),
        (["try", "xgrammar", "--regex", "[a-z"], "not closed at position 0", 2),
        (["try", "xgrammar", "--grammar", 'root ::= "a'], "line 1, column 10", 2),
        (["try", "xgrammar", "--regex", "a", "--schema", "{}"], "takes one of", 2),
        (["try", "awrs", "--constraint", "nocolon"], "module:function", 2),
        (["try", "awrs", "--constraint", "no_such_module:f"], "no module", 2),
        (["try", "dyspec", "--schema", "{}"], "takes no --schema", 2),
        (["try", "stochastok", "--data", "absent.txt"], "no file", 2),
        (["try", "tdpo", "--data", "absent.jsonl"], "no file", 2),
        (["compare", "dyspec", "tdpo"], "cannot be compared", 2),
        (["compare", "dyspec", "dyspec"], "named twice", 2),
        (["papers", "--station", "generaton"], "Did you mean generation", 2),
        (["papers", "show", "tpdo"], "Did you mean", 2),
        (["reproduce", "sphinx-v"], "no experiment yet", 2),
        (["reproduce", "tdpo", "--scale", "huge"], "no scale 'huge'", 2),
        (["reproduce", "tdpo", "--scale", "gpu"], "no version for the scale 'gpu'", 2),
        (["reproduce", "tdpo", "--scale", "cpu", "--quick"], "ask for different runs", 2),
        (["reproduce", "dyspec", "--control"], "stands on no shared test bed", 2),
        (["reproduce", "sumz", "--control"], "Did you mean sums", 2),
        (["try", "skipdecode", "--set", "speedup=0.5"], "speedup >= 1", 2),
        (["try", "tokenselect", "--set", "chunk_size=4096"], "does not fit the local window", 2),
        (["try", "r2r", "--set", "router=absent"], "holds no router", 2),
        (["try", "r-to-q-star", "--set", "score=value"], "compares with a reference", 2),
        (["train", "sphinx-v"], "nothing to train", 2),
        (["train", "r2r", "--set", "epoch=3"], "Did you mean epochs", 2),
        (["train", "r2r", "--set", "verifier=magic"], "Unknown verifier", 2),
        (["train", "r2r", "--data", "absent.txt"], "no file", 2),
        (["train", "r2r", "--config", "absent.yaml"], "no file absent.yaml", 2),
        (["train", "r2r", "--config", "src"], "src is a folder", 2),
        (["train", "r2r", "--config", "README.md"], "is not YAML", 2),
        (["train", "r2r", "--out", "pyproject.toml"], "is a file, not a folder", 2),
        (["train", "r2r", "--out", "pyproject.toml/x/y"], "is a file, not a folder", 2),
        (["reproduce", "tdpo", "--out", "pyproject.toml"], "is a file, not a folder", 2),
        (["tokenizer", "transplant", "--to", "mistral", "--out", "pyproject.toml"], "is a file, not a folder", 2),
        (["tokenizer", "supertokens", "--data", "README.md", "--out", "src"], "exists already", 2),
        (["try", "dyspec", "--trace", "src"], "A trace is written as", 2),
        (["try", "dyspec", "--trace", "trace.txt"], "trace.txt has .txt", 2),
        (["try", "dyspec", "--column", "sorce"], "Did you mean source", 2),
        (["try", "stochastok", "--column", "depth"], "Known: part, source", 2),
        (["try", "tokenadapt", "--column", "orgin"], "Did you mean origin", 2),
        (["try", "exact-bytes", "--column", "x"], "probability", 2),
        (["try", "tgdpo", "--column", "guide"], "Did you mean guide_reward", 2),
        (["try", "tdpo", "--column", "weight"], "Known: forward_kl, implicit_reward", 2),
        (["try", "rto", "--column", "reward"], "token_reward", 2),
        (["compare", "dyspec", "--trace", "all.jsonl"], "all.jsonl has .jsonl", 2),
        (["compare", "dyspec", "--plot", "plot.png"], "plot.png has .png", 2),
        (["scoreboard", "--out", "docs"], "is a folder", 2),
        (["train", "cdpo", "--set", "constrast=2"], "Did you mean contrast", 2),
        (["train", "tgdpo", "--data", "absent.jsonl"], "no file", 2),
        (["data", "sentiment", "--set", "cuont=3"], "Did you mean count", 2),
        (["data", "sentiment", "--set", "prompts=absent.txt"], "no file absent.txt", 2),
        (["data", "arithmetic", "--set", "task=juggling"], "no task 'juggling'", 2),
        (["data", "arithmetic", "--out", "pyproject.toml/x"], "is a file, not a folder", 2),
        (["try", "ift", "--set", "norm=l9"], "Unknown norm", 2),
        (["try", "rto", "--set", "estimator=td"], "Unknown estimator", 2),
        (["scoreboard", "--out", "/no/such/folder/x.md"], "does not exist", 2),
    ],
)
def test_bad_input_is_answered_in_a_sentence(arguments, words, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["everytoken", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr()
    assert stop.value.code == code
    assert words in output.err.replace("\n", " ")
    assert "Traceback" not in output.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["try", "sphinx-v"],
        ["try", "zzzzzzzz"],
        ["try", "daily-papers"],
        ["reproduce", "sphinx-v"],
        ["train", "sphinx-v"],
    ],
)
def test_a_hint_leads_somewhere(arguments):
    """A command that an error names runs, and tells something; methods that it names are there."""
    told = run(*arguments).stderr
    commands = re.findall(r"`everytoken ([^`]+)`", told)
    for command in commands:
        result = run(*command.split())
        assert result.returncode == 0 and "paper" in result.stdout
    named = re.search(r"These have: (.+)\.", told)
    assert commands or named
    for name in named[1].split(", ") if named else []:
        assert name in load_catalog()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """Seen before any work, and by writing: permissions do not tell everything."""
    import tempfile

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for arguments in (
        ("train", "r2r", "--out", tmp_path / "new" / "folder"),
        ("data", "sentiment", "--out", tmp_path / "pairs"),
        ("try", "dyspec", "--trace", tmp_path / "x.html"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert "cannot be written: Read-only file system" in result.stderr.replace("\n", " ")


@pytest.mark.slow
def test_a_disk_that_fills_up_is_no_traceback(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "plot.svg")

    monkeypatch.setattr(Path, "write_text", full)
    result = run("compare", "stochastok", "--plot", tmp_path / "plot.svg")
    assert result.returncode == 1
    assert "plot.svg: No space left on device" in result.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_model_is_named(tmp_path, letters_model, name):
    folder = tmp_path / "model"
    shutil.copytree(letters_model, folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    result = run("try", "skipdecode", "--model", folder, "--prompt", "abc", "--max-new-tokens", 2)
    assert result.returncode in (1, 2)
    assert "Traceback" not in result.stderr
    assert str(folder) in result.stderr.replace("\n", "")


# -- outputs of any encoding ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor",),
        ("papers", "--words", "speculative"),
        ("papers", "show", "dyspec"),
        ("try", "stochastok", "--prompt", "naïve 日本 strawberries", "--set", "expand_prop=1"),
        ("compare", "stochastok", "stochastok:expand_prop=1"),
    ],
)
@pytest.mark.slow
def test_any_encoding_of_the_output(arguments, encoding):
    result = run(*arguments, encoding=encoding)
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii() or encoding != "ascii"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.stdout + result.stderr)  # no colours, no bars


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.slow
def test_json_is_json_in_any_encoding(encoding):
    result = run("try", "stochastok", "--prompt", "日本 🙂 strawberries", "--json", encoding=encoding)
    assert json.loads(result.stdout)["texts"]["stochastok"] == "日本 🙂 strawberries"


def test_marks_in_ascii():
    any_encoding()
    assert "✓ █▌ \ud800 é".encode("ascii", HANDLER) == b"+ # \\ud800 \\xe9"


# -- what is shown while one waits ----------------------------------------------------------------------------------
def test_a_live_count_on_a_terminal_and_lines_elsewhere():
    screen = Console(force_terminal=True, file=io.StringIO(), width=100)
    with watched(screen) as (report, quiet):
        report("loading the model", 0, 0)
        time.sleep(0.3)
        assert "0/" not in screen.file.getvalue() and "left" not in screen.file.getvalue()  # nobody knows how long
        for done in range(0, 9, 4):
            report("plain decoding", done, 8)
            time.sleep(0.3)
        quiet()
        report("plain decoding", 8, 8)  # text is being printed now: the bar stays away
        report("decoding with x", 1, 8)
    told = screen.file.getvalue()
    assert "plain decoding" in told and "8/8" in told and "left" in told and "decoding with x" in told
    plain = Console(force_terminal=False, file=io.StringIO(), width=100)
    with watched(plain) as (report, quiet):
        for done in range(3):
            report("plain decoding", done, 8)
        quiet()
        report("decoding with x", 0, 0)
    assert plain.file.getvalue() == "plain decoding ...\ndecoding with x ...\n"


def test_trials_count_their_tokens(letters_model):
    """The plain text and the method's are both counted up to what was asked for."""
    from everytoken.decoding.trial import TrialRequest

    heard = []
    card = load_catalog()["skipdecode"]
    trial = build_trial(card, ["speedup=1.2"])
    options = {"max_new_tokens": 5, "weights": "as they come"}
    request = TrialRequest([trial], str(letters_model), "abc", options=options, report=lambda *item: heard.append(item))
    result = card.load_trial()(request)
    for stage, row in (("plain decoding", "plain generate"), ("decoding with skipdecode", "skipdecode")):
        counted = [done for name, done, total in heard if name == stage and total == 5]
        assert counted == sorted(counted)
        assert counted[0] == 0
        assert counted[-1] == result.rows[row]["new tokens"]


def test_doctor_shows_what_was_measured_on_this_machine(tmp_path, monkeypatch):
    import os

    from everytoken.cli.doctor import _calibrations
    from everytoken.core.calibration import Calibration, Curve, _keep
    from everytoken.core.machine import processor

    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path))
    lines = []

    def note(*line):
        lines.append(line)

    _calibrations(note)
    assert [line[0] for line in lines] == ["speed of weights"] and "not measured yet" in lines[0][2]
    ways = {"packed": Curve((1, 8), (0.02, 0.03)), "int4": Curve((1, 8), (0.005, 0.012), 2.0)}
    key = {"processor": processor(), "cores": os.cpu_count(), "threads": 2}
    _keep(tmp_path, Calibration(key, "llama, 30 layers", ways))
    _keep(tmp_path, Calibration(key | {"processor": "another"}, "llama, 31 layers", ways))
    lines.clear()
    _calibrations(note)
    assert [line[0].strip() for line in lines] == ["speed of weights", "llama, 30 layers, 2 threads"]
    assert lines[1][2] == "int4 5 / 12 / 68; packed 20 / 30 / 110 (the machine was busy)"


def test_nothing_is_measured_without_calibration(tmp_path, letters_model, monkeypatch):
    from everytoken.core import choosing

    monkeypatch.setenv("EVERYTOKEN_CALIBRATE", "1")
    monkeypatch.setattr(choosing, "calibrate", None)
    arguments = ("try", "skipdecode", "--model", letters_model, "--prompt", "abc", "--max-new-tokens", 2)
    result = run(*arguments, "--no-calibrate", EVERYTOKEN_CACHE=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "nothing was measured" in result.stdout.replace("\n", " ")
    assert not (tmp_path / "calibration.json").exists()


def test_several_traces_are_saved_under_names_of_their_own(tmp_path):
    traces = [TokenTrace([number], {"x": [1.0]}, ["a"]) for number in range(2)]
    assert _save(traces[:1], tmp_path / "one.jsonl") == [tmp_path / "one.jsonl"]
    written = _save(traces, tmp_path / "t.jsonl")
    assert [path.name for path in written] == ["t-1.jsonl", "t-2.jsonl"]
    assert [TokenTrace.load(path).ids for path in written] == [[0], [1]]


def test_a_prompt_longer_than_the_context(letters_model):
    """Decoders that reach beyond it are let through and say what plain decoding will do; the others are refused."""
    arguments = ("--model", letters_model, "--prompt", "abcdefgh" * 40, "--max-new-tokens", 4)
    result = run("try", "skipdecode", *arguments)
    assert result.returncode == 2
    assert "context is 256" in result.stderr
    settings = [part for pair in ("top_k=16", "n_init=4", "n_local=16", "chunk_size=16") for part in ("--set", pair)]
    result = run("try", "tokenselect", *arguments, *settings)
    assert result.returncode == 0, result.stderr
    assert "plain decoding was not trained for it" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ('{"prompt": "a", "chosen": "b"}', "line 2: 'rejected'"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "line 2: chosen and rejected are identical"),
        ("[]", "line 2: not an object"),
    ],
)
def test_bad_pairs_are_named_by_line(tmp_path, line, words, monkeypatch, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": " b", "rejected": " c"}\n' + line + "\n")
    monkeypatch.setattr(sys, "argv", ["everytoken", "try", "tdpo", "--data", str(path)])
    with pytest.raises(SystemExit):
        main()
    assert words in capsys.readouterr().err.replace("\n", " ")


def test_unusable_cache(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("try", "stochastok", EVERYTOKEN_CACHE=str(tmp_path / "file"), EVERYTOKEN_MODELS="")
    assert result.returncode == 4
    assert "EVERYTOKEN_CACHE" in result.stderr
    assert "Traceback" not in result.stderr


# -- try and compare --------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_try_dyspec_streams_measures_and_traces(tmp_path):
    path = tmp_path / "trace.html"
    result = run("try", "dyspec", "--prompt", "Say hello.", "--max-new-tokens", "16", "--trace", path)
    assert result.returncode == 0, result.stderr
    assert "plain generate" in result.stdout
    assert "tokens per second" in result.stdout
    assert "identical to plain greedy decoding" in result.stdout
    assert "trace written to" in result.stdout
    page = path.read_text()
    assert "draft_prob" in page
    assert '<option value="source" selected' in page


@pytest.mark.slow
def test_try_stochastok_as_json_and_trace_file(tmp_path):
    path = tmp_path / "trace.jsonl"
    result = run(
        "try", "stochastok", "--prompt", "strawberries everywhere", "--set", "expand_prop=2", "--json", "--trace", path
    )
    data = json.loads(result.stdout)
    assert data["rows"]["stochastok"]["tokens"] > data["rows"]["tokenizer"]["tokens"]
    assert data["texts"]["stochastok"] == "strawberries everywhere"
    assert "unchanged" in data["notes"][0]
    assert "".join(TokenTrace.load(path).texts) == "strawberries everywhere"


@pytest.mark.slow
def test_try_exact_bytes(tmp_path):
    path = tmp_path / "covers.html"
    result = run(
        "try",
        "exact-bytes",
        "--prompt",
        "The capital of France is Par",
        "--max-new-tokens",
        8,
        "--json",
        "--trace",
        path,
    )
    data = json.loads(result.stdout)
    assert data["texts"]["exact-bytes"].startswith("is") and not data["texts"]["own tokens"].startswith("is")
    assert data["rows"]["exact-bytes"]["forwards a byte"] <= 3
    assert "probability" in path.read_text()
    result = run("try", "exact-bytes", "--set", "unit=word")
    assert result.returncode == 2 and "unit is" in result.stderr
    result = run("compare", "exact-bytes", "stochastok")
    assert result.returncode == 2 and "cannot be compared" in result.stderr


@pytest.mark.slow
def test_try_dynamic_tokenization(tmp_path):
    path = tmp_path / "merged.html"
    result = run(
        "try", "dynamic-tokenization", "--set", "reduction=1", "--max-new-tokens", 4, "--json", "--trace", path
    )
    rows = json.loads(result.stdout)["rows"]
    assert rows["dynamic-tokenization"]["positions"] < 0.7 * rows["own tokens"]["positions"], result.stderr
    assert "pieces in the token" in path.read_text()
    assert run("try", "dynamic-tokenization", "--set", "boundary=line").returncode == 2


def test_supertokens(tmp_path):
    from transformers import AutoTokenizer

    from ..tokenization.common import CORPUS

    (tmp_path / "corpus.txt").write_text("\n\n".join(CORPUS))
    arguments = ("tokenizer", "supertokens", "--data", tmp_path / "corpus.txt", "--out", tmp_path / "new")
    result = run(*arguments, "--vocab-size", 400)
    assert result.returncode == 0 and "span words" in result.stdout, result.stderr
    scarce = run(*arguments[:-1], tmp_path / "scarce", "--vocab-size", 9000)  # fewer than asked for is said
    assert "tokens of 9,000 (nothing more occurs 2 times)" in scarce.stdout, scarce.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert tokenizer.decode(tokenizer("hello to the other worlds")["input_ids"]) == "hello to the other worlds"
    assert "exists already" in run(*arguments).stderr
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe")
    for extra, message in (
        (("--chunk-sizes", "x"), "numbers"),
        (("--data", tmp_path / "broken.txt"), "UTF-8"),
        (("--data", "nowhere"), "no file"),
    ):
        result = run("tokenizer", "supertokens", "--data", tmp_path / "corpus.txt", "--out", tmp_path / "other", *extra)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.slow
def test_transplants(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..tokenization.common import byte_level

    byte_level(420).save_pretrained(tmp_path / "small")
    arguments = (
        "tokenizer",
        "transplant",
        "--to",
        tmp_path / "small",
        "--out",
        tmp_path / "moved",
        "--strategy",
        "retok",
    )
    result = run(*arguments)
    assert result.returncode == 0 and "rows copied" in result.stdout, result.stderr
    model, tokenizer = (kind.from_pretrained(tmp_path / "moved") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert len(tokenizer) == len(byte_level(420)) and model.config.vocab_size == 384
    model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=2, do_sample=False)
    again = run(*arguments)
    assert again.returncode == 2 and "exists already" in again.stderr
    result = run("try", "tokenadapt", "--data", tmp_path / "small", "--set", "strategy=retok", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert rows["tokenadapt"]["bits per byte"] > rows["own tokenizer"]["bits per byte"] > 0
    assert run("try", "tokenadapt", "--set", "strategy=zett").returncode == 2


@pytest.mark.slow
def test_try_tdpo_on_own_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "The tea was", "chosen": " wonderful.", "rejected": " terrible."}] * 2
    path.write_text("\n".join(json.dumps(row) for row in rows))
    result = run("try", "tdpo", "--data", path, "--steps", "2", "--json", "--trace", tmp_path / "t.html")
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["rows"]["tdpo"]["reward margin"] > 0
    assert "implicit_reward" in (tmp_path / "t.html").read_text()


@pytest.mark.slow
def test_compare_in_one_run_with_a_plot(tmp_path):
    plot = tmp_path / "plot.svg"
    result = run("compare", "stochastok", "stochastok:expand_prop=0.5,max_expansions=3", "--plot", plot)
    assert result.returncode == 0, result.stderr
    assert "█" in result.stdout
    assert "max_expansions=3" in plot.read_text()
    from xml.dom.minidom import parse

    parse(str(plot))


# -- doctor, scoreboard, completion -----------------------------------------------------------------------------------
def test_doctor():
    result = run("doctor", "--json")
    findings = {item["what"]: item for item in json.loads(result.stdout)}
    assert findings["torch"]["state"] == "ok"
    assert findings["embedded model"]["state"] == "ok"
    assert result.returncode == 0
    assert "cache folder" in run("doctor").stdout


def test_doctor_tells_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    result = run("doctor", EVERYTOKEN_CACHE=str(tmp_path / "file"))
    assert result.returncode == 1
    assert "EVERYTOKEN_CACHE" in result.stdout


def test_scoreboard_is_written_from_the_results(tmp_path):
    root = Path(__file__).resolve().parents[2]
    out = tmp_path / "scoreboard.md"
    result = run("scoreboard", "--results", root / "results", "--out", out)
    assert result.returncode == 0
    assert out.read_text() == (root / "docs" / "scoreboard.md").read_text(), "run `everytoken scoreboard`"


def test_remeasuring_leaves_sound_files_as_they_are(tmp_path):
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "results").mkdir()
    text = (root / "results" / "dyspec.json").read_text()
    old = json.loads(text)
    for claim in old["claims"]:
        claim["verdict"] = "holds"
    (tmp_path / "results" / "dyspec.json").write_text(json.dumps(old))
    result = run("scoreboard", "--results", tmp_path / "results", "--out", tmp_path / "page.md", "--remeasure")
    assert result.returncode == 0
    assert (tmp_path / "results" / "dyspec.json").read_text() == text
    assert "| [dyspec](#dyspec) |" in (tmp_path / "page.md").read_text()


def test_reproduce_says_what_a_quick_run_claims(tmp_path, monkeypatch):
    from everytoken.catalog.cards import Card
    from everytoken.reproduce.base import Claim, Reproduction

    def measured(context):
        assert context.quick
        return {"ours": {"speed": 2.0}, "theirs": {"speed": 1.0}}

    claims = [Claim("speed", "ours", "theirs", "2x")]
    experiment = Reproduction("dyspec", "a toy", measured, claims)
    monkeypatch.setattr(Card, "load_reproduction", lambda _: experiment)
    monkeypatch.setenv("EVERYTOKEN_CACHE", str(tmp_path / "cache"))
    for flags in (["--quick"], ["--scale", "quick", "--fresh"]):
        result = RUNNER.invoke(app, ["reproduce", "dyspec", *flags, "--out", str(tmp_path)])
        assert result.exit_code == 0, result.output
        assert "only that both arms ran" in " ".join(result.stdout.split())
    assert json.loads((tmp_path / "dyspec.quick.json").read_text())["claims"][0]["verdict"] == "ran"


def test_shell_completion_knows_the_methods():
    words = {"_EVERYTOKEN_COMPLETE": "complete_bash", "COMP_WORDS": "everytoken try dy", "COMP_CWORD": "2"}
    result = RUNNER.invoke(app, [], env=words, prog_name="everytoken")
    assert "dyspec" in result.stdout


def test_version():
    from everytoken import __version__

    assert RUNNER.invoke(app, ["--version"]).stdout.strip() == f"everytoken {__version__}"


@pytest.mark.slow
def test_try_xgrammar_and_awrs(tmp_path, monkeypatch):
    schema = tmp_path / "answer.json"
    schema.write_text('{"type": "object", "properties": {"answer": {"enum": ["yes", "no"]}}, "required": ["answer"]}')
    trace = tmp_path / "t.jsonl"
    result = run("try", "xgrammar", "--schema", schema, "--prompt", "Is water wet?", "--json", "--trace", trace)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert json.loads(data["texts"]["xgrammar"])["answer"] in ("yes", "no")
    assert data["rows"]["xgrammar"]["complete texts"] == 1
    loaded = TokenTrace.load(trace)
    assert {"allowed", "source", "allowed_mass"} <= set(loaded.columns) and min(loaded.columns["allowed"]) >= 1
    (tmp_path / "checks.py").write_text("def lower(text):\n    return text == text.lower()\n")
    command = ["try", "awrs", "--constraint", "checks:lower", "--prompt", "Say hi.", "--max-new-tokens", 12, "--json"]
    monkeypatch.syspath_prepend(tmp_path)  # as with python -m in that folder
    result = run(*command)
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["texts"]["awrs"] == data["texts"]["awrs"].lower() and data["rows"]["awrs"]["tests a token"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("skipdecode", ["speedup=1.5"], "layers a forward"),
        ("tokenselect", ["top_k=16", "n_init=4", "n_local=16", "chunk_size=16"], "share of tokens attended"),
        ("r2r", ["router=entropy", "threshold=2.5"], "large model's share"),
        ("r-to-q-star", ["width=3"], "log-probability"),
    ],
)
def test_try_the_decoders_of_the_station(name, settings, words, tmp_path):
    page = tmp_path / "trace.html"
    pairs = [part for pair in settings for part in ("--set", pair)]
    result = run("try", name, *pairs, "--max-new-tokens", "12", "--prompt", "Why do cats purr?", "--trace", page)
    assert result.returncode == 0, result.stderr
    assert words in result.stdout
    assert "tokens per second" in result.stdout
    assert "<html" in page.read_text()


@pytest.mark.slow
def test_compare_decoders_whose_traces_differ(tmp_path):
    page = tmp_path / "traces.html"
    result = run(
        "compare", "skipdecode:speedup=1.2", "r2r:threshold=2.5", "r-to-q-star:width=2", "--max-new-tokens", "8",
        "--trace", page,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "r2r:threshold=2.5" in result.stdout
    assert page.is_file()


def test_train_r2r_from_a_configuration(tmp_path):
    """The whole pipeline, on two small models saved to folders."""
    from everytoken.reproduce.beds.small_models import character_tokenizer

    from ..conftest import tiny_llama

    tokenizer = character_tokenizer("abcdefgh.")
    for name, seed in (("large", 1), ("small", 2)):
        tiny_llama(len(tokenizer), seed=seed, scale=0.5).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("ab", "cd", "ef", "gh", "ba"))
    )
    (tmp_path / "r2r.yaml").write_text(
        f"small: {tmp_path / 'small'}\nverifier: builtins:hash\nmax_new_tokens: 6\n"
        "width: 16\nnum_blocks: 1\nepochs: 2\n"
    )
    result = run(
        "train", "r2r", "--model", tmp_path / "large", "--data", tmp_path / "prompts.jsonl",
        "--config", tmp_path / "r2r.yaml",
        "--set", "epochs=3", "--out", tmp_path / "router", "--json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)["figures"]
    assert figures["tokens"] == 30
    assert json.loads((tmp_path / "router" / "training.json").read_text())["settings"]["epochs"] == 3
