"""finetune verify FILE: is the adapter file whole, and what does each program make of it?

Exit status: 0 when the file is whole and the programs that it is made for load all of it rightly; 1 when something must
be known, which is said; 2 when the file cannot be read.

`--json` prints one object:

    file, format, family    str
    sound                   bool: exit status 0
    layers                  int
    checks                  [{"title": str, "state": "holds" | "fails" | "open", "lines": [str]}]
    made_for                [str]: the clients that must load all of it
    clients                 [{"client": str, "layers": int, "loaded": int, "said": str, "findings": [{"effect":
                            "refuses" | "ignores" | "misreads" | "hides", "reason": str, "names": [str]}]}]
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from finetune.errors import FAILED, Fault
from finetune.imports import swift

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import RenderableType

    from finetune.export.verification import Report

MARKS = {"holds": ("ok", "green"), "fails": ("no", "red"), "open": ("??", "yellow")}
SHOWN = 8


@dataclass(frozen=True)
class Config:
    """Check an adapter file, anyone's: is it whole, does it fit, what does each program make of it?

    Exit status: 0 when the programs that it is made for load all of it, 1 when something must be known, 2 when it
    cannot be read.
    """

    file: Positional[Path]
    """The adapter, a .safetensors file."""
    model: str | None = None
    """Its base, as for `finetune generate`: the adapter is loaded onto it through diffusers and by the formulas of its
    kind, and both are compared. Default: without a base, shapes are compared with the published models'."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    model_config: str | None = None
    """For a .safetensors checkpoint: folder or hub name of a diffusers model of the same kind."""
    clients: tuple[str, ...] = ()
    """The programs that must load all of it: diffusers, sd-scripts, ComfyUI, A1111, Forge, InvokeAI. Default: those
    that files of its format are for."""
    json: bool = False
    """Print one JSON object: file, format, family, sound, layers, checks, made_for, clients."""


def main(config: Config) -> None:
    # What can be refused is refused before a model is loaded.
    from finetune import weights

    weights.check_file(config.file)

    from dataclasses import replace

    with swift():
        from finetune import families
        from finetune.export import clients, verification

    known = {name.lower(): name for name in clients.CLIENTS}
    if wrong := [name for name in config.clients if name.lower() not in known]:
        raise Fault(f"--clients {' '.join(wrong)}: no such client. Known are: {', '.join(known.values())}.")
    base = None
    if config.model is not None:
        base = families.load(families.Source(config.model, config.revision, config.model_config))
    report = verification.verify(config.file, base)
    asked = [known[name.lower()] for name in config.clients]
    if unknown := [name for name in asked if name not in report.family.published.clients]:
        told = ", ".join(report.family.published.clients)
        raise Fault(f"--clients {' '.join(unknown)}: not known for {report.family.title}. Known are: {told}.")
    if config.clients:
        report = replace(report, made_for=asked)
    if config.json:
        print(json.dumps(_plain(report), indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for piece in _text(report):
            console.print(piece, width=min(console.width, 100), soft_wrap=False)
    if not report.sound:
        sys.exit(FAILED)


def _plain(report: Report) -> dict[str, Any]:
    """What `--json` prints."""
    verdicts = [{**asdict(verdict), "said": verdict.said} for verdict in report.verdicts]
    return {
        "file": str(report.path),
        "format": report.format,
        "family": report.family.title,
        "sound": report.sound,
        "layers": report.layers,
        "checks": [asdict(check) for check in report.checks],
        "made_for": report.made_for,
        "clients": verdicts,
    }


def _text(report: Report) -> Iterator[RenderableType]:
    """The report for reading."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    yield Text(f"{report.path}: {report.layers} layers for {report.family.title}, format {report.format}\n", "bold")
    table = Table.grid(padding=(0, 1))
    for check in report.checks:
        mark, style = MARKS[check.state]
        table.add_row(Text(mark, style), Text(check.title))
        for line in _some(check.lines):
            shade = "dim" if check.state == "holds" else style
            table.add_row("", Padding(Text(line, shade, overflow="fold"), (0, 0, 0, 2)))
    yield table
    yield Text("\nWhat each program makes of its names and alphas (* it is made for these):\n", "bold")
    table = Table.grid(padding=(0, 1))
    for verdict in report.verdicts:
        meant = verdict.client in report.made_for
        style = "green" if verdict.whole else "red" if meant else "yellow"
        table.add_row("*" if meant else "", Text(verdict.client), Text(verdict.said, style))
        for finding in verdict.findings:
            names = ", ".join(_some(finding.names, 2)) if len(finding.names) < verdict.layers else "all of it"
            table.add_row("", "", Text(f"{finding.reason}: {names}", "dim", overflow="fold"))
    yield table
    yield Text(f"\n{_summary(report)}", "bold")


def _summary(report: Report) -> str:
    if not report.sound:
        return "Something must be known: see above."
    asked = all(check.state == "holds" for check in report.checks)
    return "All is well." if asked else "Nothing is wrong with what could be asked; ?? could not."


def _some(lines: list[str], most: int = SHOWN) -> list[str]:
    from finetune.data.reading.pictures import printable

    shown = [printable(line) for line in lines[:most]]
    return shown + ([f"and {len(lines) - most} more"] if len(lines) > most else [])
