"""finetune inspect FILE: what a weight file or a model's folder is.

`--json` prints one object. Of every file:

    file, what, format, family    str or null: "what" is adapter, checkpoint, textual inversion, model, part of a
                                  diffusers model, unknown
    bytes, tensors                int
    parts                         {name: int}: an adapter's layers, a checkpoint's numbers, a model's bytes in each part
    precisions                    {"fp16": int}: tensors of each, single numbers (alphas) left out
    metadata                      {name: str}: the header
    problems                      [str]: what is not understood of it

of files, not folders:

    base, base_version, title, trigger    str or null, as the header says
    words                         [str]: new words (textual inversion) that it holds, or that it was trained with
    settings                      {name: value}: how it was trained, where this toolkit did
    hashes                        [{"name": str, "told": str, "found": str, "holds": bool}]

and of adapters that are whole:

    kinds                         {"LoRA": int}: layers of each kind
    layers                        int
    ranks, alphas                 [{"rank": int, "layers": int}], [{"alpha": float or null, "layers": int}]
    norms                         [{"block": str, "layers": int, "norm": float or null}]: Frobenius norm of the change;
                                  null for DoRA, whose change depends on the base
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from finetune.imports import swift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

BAR = 24
LONG = 160
"""Characters of a value that are shown; `--json` shows all."""


@dataclass(frozen=True)
class Config:
    """Say what a weight file is, anyone's: adapter, checkpoint, embedding, or a model's folder."""

    file: Positional[Path]
    """A .safetensors file, or the folder of a diffusers model."""
    json: bool = False
    """Print one JSON object: file, what, format, family, bytes, parts, ranks, alphas, norms, metadata and more."""


def main(config: Config) -> None:
    with swift():
        from finetune.export import inspection

    told = inspection.inspect(config.file)
    if config.json:
        print(json.dumps(told, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for piece in _text(told):
        console.print(piece, width=min(console.width, 100))


def _text(told: dict[str, Any]) -> Iterator[RenderableType]:
    """The same for reading."""
    from rich.text import Text

    kind = " + ".join(told.get("kinds", {})) or told["what"]
    yield Text(f"{told['file']}: {kind}{', ' + told['format'] if told['format'] else ''}\n", "bold")
    yield _rows(_facts(told))
    for problem in told["problems"]:
        yield Text(f"  not understood: {problem}", "red")
    if told.get("norms"):
        yield Text("\nSize of the change (Frobenius norm)\n", "bold")
        yield _bars(told["norms"])
    if told.get("settings"):
        yield Text("\nTrained with\n", "bold")
        yield _rows({name: str(value) for name, value in told["settings"].items()})
    if told["metadata"]:
        yield Text("\nHeader\n", "bold")
        yield _rows(told["metadata"])
    for one in told.get("hashes", []):
        mark = Text("holds", "green") if one["holds"] else Text(f"does not hold: it is {one['found']}", "red")
        yield Text.assemble("  hash ", one["name"], " ", mark)


def _facts(told: dict[str, Any]) -> dict[str, str]:
    """The first lines; what is not known is left out."""
    unit = {"checkpoint": "numbers", "model": "bytes", "adapter": "layers"}.get(told["what"], "vectors")
    facts = {
        "for": told["family"],
        "base": ", ".join(str(told[name]) for name in ("base", "base_version") if told.get(name)),
        "title": told.get("title"),
        "trigger": told.get("trigger"),
        "new words": _new_words(told),
        "layers": ", ".join(f"{count} {kind}" for kind, count in told.get("kinds", {}).items()),
        "rank": _counted(told.get("ranks", []), "rank"),
        "alpha": _counted(told.get("alphas", []), "alpha"),
        "parts": ", ".join(f"{part} {count:,} {unit}" for part, count in told["parts"].items()),
        "predicts": told.get("scheduler", {}).get("prediction"),
        "size": f"{told['bytes'] / 1e6:,.2f} MB, {told['tensors']} tensors, "
        + ", ".join(f"{name} {count}" for name, count in told["precisions"].items()),
    }
    return {name: str(value) for name, value in facts.items() if value}


def _new_words(told: dict[str, Any]) -> str:
    """Those that it holds; of an adapter the files that belong to it."""
    files = told["what"] == "adapter"
    said = ", ".join(f"{word}.safetensors" if files else word for word in told.get("words", []))
    return f"goes with {said}" if said and files else said


def _counted(rows: list[dict[str, Any]], name: str) -> str:
    """`16` where all layers have it, else each with its number of layers."""
    if len(rows) == 1:
        return "none: a scale of 1" if rows[0][name] is None else f"{rows[0][name]:g}"
    return ", ".join(f"{row[name]:g} ({row['layers']} layers)" for row in rows if row[name] is not None)


def _rows(facts: dict[str, str]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    from finetune.data.reading.pictures import printable

    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        short = value if len(value) <= LONG else f"{value[:LONG]} ... ({len(value):,} characters)"
        table.add_row(Text(f"  {printable(name)}", overflow="fold"), Text(printable(short), overflow="fold"))
    return table


def _bars(norms: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    most = max((row["norm"] or 0.0 for row in norms), default=0.0) or 1.0
    table = Table.grid(padding=(0, 2))
    for row in norms:
        known = row["norm"] is not None
        bar = "█" * round(BAR * row["norm"] / most) if known else "needs the base"
        table.add_row(Text(f"  {row['block']}"), str(row["layers"]), f"{row['norm']:.3g}" if known else "", bar)
    return table
