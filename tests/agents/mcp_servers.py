"""Real servers as programs of their own, for tests: ``python mcp_servers.py KIND``."""

from __future__ import annotations

import json
import sys
import time


def main(kind: str) -> None:
    if kind == "silent":
        time.sleep(600)
    if kind == "crash":
        sys.exit(3)
    from mcp.server.mcpserver import MCPServer

    server = MCPServer(kind)

    def add(a: int, b: int) -> int:
        """Add two numbers"""
        return a + b

    def environment() -> str:
        """Names of the variables that this process sees"""
        import os

        return json.dumps(dict(os.environ))

    def hang() -> str:
        """Never answers"""
        time.sleep(600)
        return ""

    server.add_tool(add)
    server.add_tool(environment)
    server.add_tool(hang)
    if kind == "huge":
        server.add_tool(lambda: "x", "huge", description="x" * 20_000_000)
    if kind == "noisy":
        print("this is no message", flush=True)
    if kind.startswith("http:"):
        import uvicorn

        uvicorn.run(server.streamable_http_app(), host="127.0.0.1", port=int(kind[5:]), log_level="error")
    else:
        server.run()


if __name__ == "__main__":
    main(sys.argv[1])
