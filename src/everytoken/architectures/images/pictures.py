"""Pictures of images that grow: in the terminal, as PNG, and as a page's slider over steps.

An image is ``[height, width]``, ``[1, height, width]`` or ``[3, height, width]`` with values from -1 to 1.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ...core.errors import BadInputError
from ...core.files import write_whole

SHADES = " ░▒▓█"
ZOOM = 160
"""Pixels a side, about, of a picture on a page."""


def pixels_of(image: torch.Tensor) -> torch.Tensor:
    """An image as bytes ``[height, width, 3]``; what lies outside of -1 to 1 is cut.

    Raises:
        BadInputError: another shape, or values that are no numbers.
    """
    found = image.detach().float().cpu()
    if found.dim() == 2:
        found = found[None]
    if found.dim() != 3 or found.shape[0] not in (1, 3) or not found.numel():
        raise BadInputError(f"An image has shape [height, width], [1, ...] or [3, ...]; got {[*image.shape]}.")
    if not bool(found.isfinite().all()):
        raise BadInputError("The image has values that are no numbers.")
    bytes_ = ((found.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return bytes_.expand(3, -1, -1).permute(1, 2, 0).contiguous()


def shaded(image: torch.Tensor) -> str:
    """Lines of shades, two characters a pixel: for any terminal, and for text."""
    grey = pixels_of(image).float().mean(-1)
    level = (grey / 256 * len(SHADES)).long()
    return "\n".join("".join(SHADES[value] * 2 for value in row).rstrip() for row in level.tolist())


def half_blocks(image: torch.Tensor) -> str:
    """Lines of half-blocks in true colours, one character for two pixels: for terminals with colours."""
    pixels = pixels_of(image)
    if len(pixels) % 2:
        pixels = torch.cat([pixels, torch.zeros_like(pixels[:1])])
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)


def beside(blocks: Sequence[str], gap: int = 3) -> str:
    """Pictures of one height beside each other; they hold no escape codes."""
    rows = [block.split("\n") for block in blocks]
    widths = [max(map(len, row)) for row in rows]
    height = max(map(len, rows))
    full = [[line.ljust(width) for line in row + [""] * (height - len(row))]
            for row, width in zip(rows, widths, strict=True)]  # fmt: skip
    return "\n".join((" " * gap).join(parts).rstrip() for parts in zip(*full, strict=True))


def tiled(images: torch.Tensor, columns: int | None = None, gap: int = 1) -> torch.Tensor:
    """Images ``[B, channels, height, width]`` as one ``[channels, ...]``, row by row, with gaps of middle grey.

    Raises:
        BadInputError: no images.
    """
    if images.dim() != 4 or not len(images):
        raise BadInputError(f"Images have shape [B, channels, height, width]; got {[*images.shape]}.")
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    whole = images.new_zeros(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        whole[:, top : top + height, left : left + width] = image
    return whole


def png(image: torch.Tensor, zoom: int = 1) -> bytes:
    """An image as a PNG file, every pixel drawn ``zoom`` times a side."""
    pixels = pixels_of(image)
    if zoom > 1:
        pixels = pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    height, width, _ = pixels.shape
    lines = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.flatten(1)], 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def write_png(image: torch.Tensor, path: Path, zoom: int = 1) -> Path:
    """Writes ``png``, whole or not at all.

    Raises:
        BadInputError: a name that does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise BadInputError(f"A picture is written as PNG; got {path.name}.", "Give a name that ends in .png.")
    data = png(image, zoom)
    write_whole(path, lambda place: place.write_bytes(data))
    return path


def image_html(image: torch.Tensor, description: str, zoom: int | None = None) -> str:
    """An image as an ``img`` element that holds its data."""
    side = max(image.shape[-2:])
    data = base64.b64encode(png(image, zoom or max(1, ZOOM // side))).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(description)}">'


def slider(frames: Sequence[torch.Tensor], labels: Sequence[str], title: str) -> str:
    """Frames of one image with a slider over them, as a piece of HTML that needs nothing else.

    Raises:
        BadInputError: no frames, or not one label a frame.
    """
    if not frames or len(frames) != len(labels):
        raise BadInputError(f"A slider has frames with a label each; got {len(frames)} and {len(labels)}.")
    shown = []
    for number, (frame, label) in enumerate(zip(frames, labels, strict=True)):
        hidden = "" if number == len(frames) - 1 else " hidden"
        shown.append(
            f"<figure{hidden}>{image_html(frame, f'{title}, {label}')}<figcaption>{html.escape(label)}</figcaption>"
            "</figure>"
        )
    last = len(frames) - 1
    script = "[...this.closest('div').querySelectorAll('figure')].forEach((item,n)=>item.hidden=n!=this.value)"
    return (
        f'<div class="growing"><label>{html.escape(title)} <input type="range" min="0" max="{last}" value="{last}" '
        f'oninput="{script}"></label>{"".join(shown)}</div>'
    )
