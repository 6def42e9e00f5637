"""``everytoken serve`` as a shell starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from everytoken.cli.app import app
from everytoken.core.errors import BadInputError, EverytokenError

from .models import tiny_chat

pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--host", "0.0.0.0"], "lets others use this machine"),
        (["--set", "budget=4"], "none is named"),
        (["--decoder", "tdpo"], "is no decoder"),
        (["--decoder", "dyspec", "--set", "budget=-4"], "budget"),
    ],
)
def test_what_cannot_be_served_is_refused_before_weights_are_read(arguments, told, monkeypatch):
    monkeypatch.delenv("EVERYTOKEN_API_KEY", raising=False)
    monkeypatch.setattr("everytoken.core.loading.load_model", None)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(result.exception, EverytokenError | BadInputError) and told in str(result.exception)


@pytest.mark.slow
def test_a_process_serves_until_it_is_interrupted(tmp_path):
    model, tokenizer = tiny_chat()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "everytoken", "serve", "--model", str(tmp_path / "tiny"), "--port", str(port)]
    environment = os.environ | {"EVERYTOKEN_API_KEY": "secret", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            url, body = f"http://127.0.0.1:{port}", {"prompt": "ab", "max_tokens": 3}
            for _ in range(600):
                try:
                    httpx2.get(f"{url}/health")
                    break
                except httpx2.HTTPError:
                    assert process.poll() is None
                    time.sleep(0.1)
            assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
            answer = httpx2.post(f"{url}/v1/completions", json=body, headers={"authorization": "Bearer secret"})
            assert answer.json()["model"] == "tiny" and answer.json()["usage"]["completion_tokens"] <= 3
        finally:
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
    assert f"serving tiny on {url}/v1" in told and "Traceback" not in told
