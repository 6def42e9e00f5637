"""The adapter inside lm-evaluation-harness itself; `make test-lm-eval` installs it in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from everytoken.core.errors import BadInputError, UnknownNameError
from everytoken.integrations.lm_eval import DecodedModel, register

SOURCE = Path(__file__).resolve().parents[2] / "src"
pytestmark = pytest.mark.slow
PROMPTS = ["The capital of France is", "1, 2, 3, 4,", "Water is made of hydrogen and"]


def asked(kind="generate_until", **settings):
    if kind == "loglikelihood":
        return [Instance(kind, {}, (prompt, " the"), index) for index, prompt in enumerate(PROMPTS)]
    given = {"until": ["\n"], "max_gen_toks": 8} | settings
    return [Instance(kind, {}, (prompt, given), index) for index, prompt in enumerate(PROMPTS)]


def made(**arguments):
    return DecodedModel(device="cpu", dtype="float32", **arguments)


@pytest.fixture(scope="module")
def plain():
    return made(batch_size=1)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_lossless_decoder_writes_what_the_model_writes(plain, batch_size):
    ours = made(decoder="dyspec", draft_model="text", budget=4, batch_size=batch_size)
    wanted = plain.generate_until(asked(), disable_tqdm=True)
    assert ours.generate_until(asked(), disable_tqdm=True) == wanted
    assert len({*wanted}) == 3 and all(wanted)


def test_what_no_decoder_honours_is_refused(plain):
    register()
    register()  # a second time changes nothing
    assert get_model("everytoken") is DecodedModel
    with pytest.raises(UnknownNameError):
        made(decoder="dispek")
    with pytest.raises(BadInputError, match="settings of no decoder"):
        made(budget=4)
    ours = made(decoder="dyspec", draft_model="text")
    with pytest.raises(BadInputError, match="decoder=none"):
        ours.loglikelihood(asked("loglikelihood"))
    with pytest.raises(BadInputError, match="penalty_alpha"):
        ours.generate_until(asked(penalty_alpha=0.6), disable_tqdm=True)
    assert all(value < 0 for value, _ in plain.loglikelihood(asked("loglikelihood"), disable_tqdm=True))


def test_its_command_line_runs_a_task(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"question": p, "answer": "x"}) + "\n" for p in PROMPTS))
    (tmp_path / "own.yaml").write_text(
        "task: own_task\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{tmp_path}/rows.jsonl'}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 6}\n"
        "metric_list: [{metric: bypass, aggregation: bypass, higher_is_better: true}]\n"
    )
    command = [
        sys.executable, "-m", "everytoken.integrations.lm_eval", "--model", "everytoken", "--tasks", "own_task",
        "--include_path", str(tmp_path), "--model_args", "decoder=dyspec,draft_model=text,budget=4",
        "--device", "cpu", "--output_path", str(tmp_path / "out"), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (samples,) = tmp_path.rglob("samples_own_task*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [row["doc"]["question"] for row in sorted(rows, key=lambda row: row["doc_id"])] == PROMPTS
    assert all(row["resps"][0][0] for row in rows)
