"""What the tests of this station share: specs, a fake embedder that is a hash, real servers on loopback."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from everytoken.agents.base import ToolSpec
from everytoken.agents.servers import ServerEntry

PROGRAM = str(Path(__file__).with_name("mcp_servers.py"))
PATH = {"PYTHONPATH": os.pathsep.join(item for item in sys.path if item)}
"""What a server's process needs to find the SDK where the tests found it."""


def embed(texts):
    """Unit vectors of words' hashes: alike where words are shared, and cheap."""
    vectors = np.zeros((len(texts), 64), np.float32)
    for row, text in enumerate(texts):
        vectors[row, 0] = 1e-3
        for word in text.lower().replace(".", " ").replace("?", " ").split():
            vectors[row, hashlib.sha256(word.encode()).digest()[0] % 64] += 1
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def spec(name, description="", server="s", **more):
    return ToolSpec(server, name, description, **more)


def program(kind, id=None):
    return ServerEntry(id or kind, sys.executable, (PROGRAM, kind), PATH)


@contextlib.contextmanager
def over_http(kind="http"):
    """A real server of streamable HTTP in a process of its own; yields its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, PROGRAM, f"{kind}:{port}"], env={**os.environ, **PATH})
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()
