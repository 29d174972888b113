"""Pictures as files and side by side: PNG that carries its settings, and labelled grids."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image as Images
from PIL import ImageDraw, ImageFont
from PIL.Image import Image
from PIL.PngImagePlugin import PngInfo

from finetune import provenance

PAPER, INK = "white", "black"
GAP = 8
"""Pixels between pictures and around labels."""
MIN_SIDE = 192
"""Pictures smaller than this are enlarged in a grid, so that a label fits above them."""


def save_png(image: Image, path: Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG with its settings, beside the name first and then renamed.

    Text `parameters`: the form that the style UIs read. Text `finetune`: JSON. Both hold only what
    `finetune.provenance` allows, and `adapters`: a list of {name, sha256, scale}.
    """
    told = provenance.public({"width": image.width, "height": image.height, **settings}, provenance.PICTURE)
    adapters = [_adapter(adapter) for adapter in settings.get("adapters", ())]
    info = PngInfo()
    info.add_itxt("parameters", _parameters(told, adapters))
    info.add_itxt("finetune", provenance.dumps({**told, "adapters": adapters, "software": provenance.software()}))
    beside = path.with_name(f".{path.name}.writing")
    try:
        image.save(beside, format="PNG", pnginfo=info)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that `save_png` wrote; empty for other pictures."""
    with Images.open(path) as image:
        return dict(json.loads(getattr(image, "text", {}).get("finetune", "{}")))


def grid(
    rows: Sequence[Sequence[Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str | None = None,
) -> Image:
    """Pictures in a table with a label before each row and above each column; long labels are wrapped.

    Small pictures are enlarged by a whole factor, pixel by pixel, so that nothing is smoothed away.
    """
    if len(rows) != len(row_labels) or any(len(row) != len(column_labels) for row in rows):
        raise ValueError(f"{[len(row) for row in rows]} pictures, {len(row_labels)} rows, {len(column_labels)} columns")
    factor = max(1, -(-MIN_SIDE // max(max(image.size) for row in rows for image in row)))
    cells = [[image.resize((image.width * factor, image.height * factor), Images.Resampling.NEAREST) for image in row]
             for row in rows]  # fmt: skip
    width, height = max(c.width for row in cells for c in row), max(c.height for row in cells for c in row)
    title, row_labels, column_labels = plain(title or ""), [*map(plain, row_labels)], [*map(plain, column_labels)]
    font, heading = ImageFont.load_default(max(14, width // 18)), ImageFont.load_default(max(18, width // 13))

    columns = [wrap(label, font, width) for label in column_labels]
    left = 0 if not any(row_labels) else GAP + max(_width(line, font) for line in _lines(row_labels, font, width))
    total = left + len(column_labels) * (width + GAP) + GAP
    titles = wrap(title, heading, total - 2 * GAP)
    top_title = GAP + _block(titles, heading) if titles else 0
    top = top_title + (GAP + max(_block(lines, font) for lines in columns) if any(columns) else 0) + GAP
    names = [wrap(label, font, width) for label in row_labels]
    heights = [max(height, _block(lines, font)) for lines in names]

    sheet = Images.new("RGB", (total, top + sum(heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, (total // 2, GAP), titles, heading, "ma")
    for j, lines in enumerate(columns):
        x = left + GAP + j * (width + GAP) + width // 2
        _write(draw, (x, top - GAP - _block(lines, font)), lines, font, "ma")
    y = top
    for lines, row, tall in zip(names, cells, heights, strict=True):
        _write(draw, (left, y + (tall - _block(lines, font)) // 2), lines, font, "ra")
        for j, cell in enumerate(row):
            x = left + GAP + j * (width + GAP)
            sheet.paste(cell, (x + (width - cell.width) // 2, y + (tall - cell.height) // 2))
        y += tall + GAP
    return sheet


def stacked(sheets: Sequence[Image]) -> Image:
    """The sheets below one another, their right sides flush (row labels stand at the left)."""
    width, height = max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)
    page, y = Images.new("RGB", (width, height), PAPER), 0
    for sheet in sheets:
        page.paste(sheet, (width - sheet.width, y))
        y += sheet.height
    return page


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def plain(text: str) -> str:
    """The text in the letters that PIL's own font has (ASCII): accents fall, other letters are written as codes."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return bare.encode("ascii", "backslashreplace").decode()


def wrap(text: str, font: Font, width: int) -> list[str]:
    """Lines no wider than `width` pixels; a word that is wider is cut where it must be."""
    lines: list[str] = []
    for word in text.split():
        if lines and _width(f"{lines[-1]} {word}", font) <= width:
            lines[-1] += f" {word}"
            continue
        while _width(word, font) > width:
            fits = max((n for n in range(1, len(word)) if _width(word[:n], font) <= width), default=1)
            lines.append(word[:fits])
            word = word[fits:]
        lines.append(word)
    return lines


def _lines(labels: Sequence[str], font: Font, width: int) -> list[str]:
    return [line for label in labels for line in wrap(label, font, width)]


def _width(text: str, font: Font) -> int:
    return round(font.getlength(text))


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Agy|")
    return round((bottom - top) * 1.25)


def _block(lines: Sequence[str], font: Font) -> int:
    return len(lines) * _line_height(font)


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: Font, anchor: str) -> None:
    for i, line in enumerate(lines):
        draw.text((at[0], at[1] + i * _line_height(font)), line, INK, font, anchor)


def _adapter(adapter: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": Path(str(adapter["name"])).name, "sha256": adapter["sha256"], "scale": adapter["scale"]}


def _parameters(told: Mapping[str, Any], adapters: Sequence[Mapping[str, Any]]) -> str:
    """Prompt, negative prompt, then `Name: value` pairs, as AUTOMATIC1111 writes and reads them."""
    loras = "".join(f" <lora:{Path(a['name']).stem}:{a['scale']:g}>" for a in adapters)
    pairs = {
        "Steps": told.get("steps"),
        "Sampler": told.get("scheduler"),
        "CFG scale": told.get("guidance"),
        "Seed": told.get("seed"),
        "Size": f"{told['width']}x{told['height']}",
        "Denoising strength": told.get("strength"),
        "Clip skip": told.get("clip_skip"),
        "Model": told.get("model"),
    }
    lines = [f"{told.get('prompt', '')}{loras}"]
    if told.get("negative"):
        lines.append(f"Negative prompt: {told['negative']}")
    lines.append(", ".join(f"{name}: {value}" for name, value in pairs.items() if value is not None))
    return "\n".join(lines)
