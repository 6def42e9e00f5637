"""A published server in an environment of its own, which speaks an older revision of the protocol."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("mcp")

from everytoken.agents.base import Key
from everytoken.agents.serve import Caller
from everytoken.agents.servers import ServerEntry
from everytoken.agents.store import SQLiteStore
from everytoken.agents.sync import SyncSettings, sync
from everytoken.agents.transports import Limits


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_time_server_of_pypi(tmp_path):
    """Installed from the registry into a new environment (about 30 s); skipped where that fails."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "mcp-server-time"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if subprocess.run(install, env=alone).returncode:
        pytest.skip("mcp-server-time cannot be installed here")
    entry = ServerEntry("time", str(python), ("-m", "mcp_server_time"))
    limits = Limits(seconds=60.0)
    with SQLiteStore() as store:
        report = asyncio.run(sync([entry], store, settings=SyncSettings(limits=limits)))
        assert not report.failed
        assert Key("time", "convert_time") in report.created
        again = asyncio.run(sync([entry], store, settings=SyncSettings(limits=limits, force=True)))
        assert (again.writes, again.unchanged) == (0, report.writes)
    arguments = {"source_timezone": "UTC", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    told = json.loads(asyncio.run(Caller([entry], limits=limits).call(Key("time", "convert_time"), arguments)))
    assert told["time_difference"] == "+9.0h"
