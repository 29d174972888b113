"""finetune report RUN: one HTML page of a run that needs nothing else. See `finetune/report/`."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from finetune.errors import Failure, Fault


@dataclass(frozen=True)
class Config:
    """Make one HTML page of a run: verdict, pictures, curves, settings, files. It needs no network and no other file.

    Training and `finetune evaluate` keep RUN/report.html themselves; this makes it of any run, whenever you say so.
    """

    run: Positional[Path]
    """The run's folder, while it trains or afterwards."""
    output: Path | None = None
    """The file to write. Default: RUN/report.html. A report that is there is written over, other files are not."""
    open: bool = False
    """Show it in the browser."""
    serve: bool = False
    """Show it at a local address that follows the run, until Ctrl-C. Nothing is written."""
    port: int = 8377
    """Of that address, on this machine alone; 0: any that is free."""


def main(config: Config) -> None:
    if config.serve and config.output is not None:
        raise Fault("--serve writes nothing: leave --output out, or make the page without --serve.")
    _serve(config) if config.serve else _write(config)


def _write(config: Config) -> None:
    from finetune.report import page

    file = config.output or config.run / page.FILE
    if config.output is not None or file.exists():
        page.require_own(file)
    try:
        page.write(config.run, file)
    except OSError as error:
        raise Failure(f"{file}: could not be written ({error.strerror}). Name another file: --output.") from error
    print(file)
    if config.open:
        _show(file.resolve().as_uri())


def _serve(config: Config) -> None:
    from finetune.report.serving import Server

    with Server(config.run, config.port) as server:
        print(f"{server.address} follows {config.run}. Ctrl-C ends it.", flush=True)
        if config.open:
            _show(server.address)
        server.serve_forever()


def _show(address: str) -> None:
    if not webbrowser.open(address):
        print(f"No browser was found. Open it yourself: {address}")
