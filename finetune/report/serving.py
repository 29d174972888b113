"""The report over HTTP, for this machine alone: made anew when the run has changed, which the page asks for."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from finetune.errors import Fault
from finetune.report import facts, page

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Holds the page as it was made last."""

    daemon_threads = True

    def __init__(self, run: Path, port: int) -> None:
        """`port` 0: any that is free. Raises Fault where there is no run, and when the port cannot be had."""
        self.run, self._lock = run, Lock()
        self._version, self._page = "", b""
        self.page()
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise Fault(
                f"--port {port}: cannot be had ({error}). Name another one; 0 takes any that is free."
            ) from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> bytes:
        """The page as the run is now."""
        with self._lock:
            version = facts.version(self.run)
            if version != self._version:
                self._page = page.render(facts.read(self.run), live=version).encode()
                self._version = version
            return self._page

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that has gone is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # Names that other sites let point here (DNS rebinding) are refused.
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}:
            return self._answer(421, b"Only for this machine.\n", "text/plain; charset=utf-8")
        try:
            match self.path.partition("?")[0]:
                case "/":
                    self._answer(200, self.server.page(), "text/html; charset=utf-8")
                case "/version":
                    self._answer(200, facts.version(self.server.run).encode(), "text/plain; charset=utf-8")
                case _:
                    self._answer(404, b"There is nothing else here.\n", "text/plain; charset=utf-8")
        except Fault as fault:  # the run's folder has gone
            self._answer(410, f"{fault}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Questions that come every two seconds are not told."""
