"""Fetches the JSON-Schema-Test-Suite for the tests: it ships inside the source distribution of the package jsonschema.

python scripts/fetch_suite.py FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "jsonschema==4.26.0"
PREFIX = "json/tests/draft2020-12/"


def main(folder: Path) -> None:
    if (folder / "allOf.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary", ":all:", PACKAGE, "-d", place], check=True)
        with tarfile.open(next(Path(place).glob("*.tar.gz"))) as archive:
            for member in archive.getmembers():
                _, _, inside = member.name.partition("/")
                if member.isfile() and inside.startswith(PREFIX):
                    target = folder / inside.removeprefix(PREFIX)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = archive.extractfile(member)
                    assert source is not None
                    target.write_bytes(source.read())
    print(f"{len(list(folder.rglob('*.json')))} files of the JSON-Schema-Test-Suite in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
