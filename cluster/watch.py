"""The report of a run while it goes, served to a browser: `mllm watch RUN`.

The page is the one that a finished run leaves as `report.html`, made from the run's files when somebody asks and the last is some
seconds old; of steps and evaluations it reads those that have come since. It is served to this machine alone unless `host` says
otherwise, and it only shows: nothing can be asked of a run through it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cluster.evidence import Evidence
from cluster.report import report_page
from cluster.run import open_run
from cluster.site import Site
from cluster.views import run_standing

LOOPBACK = "127.0.0.1"

OFTEN = 10
"""Seconds after which a browser asks for the page of a run again that is not at its end."""

LEAST = 3.0
"""Seconds for which a page that was made serves all who ask."""


class Pages:
    """Makes the page of one run, and makes it anew when it is older than `LEAST` and somebody asks."""

    def __init__(self, site: Site, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.site = site
        self.name = name
        self.clock = clock
        self.lock = threading.Lock()
        self.made = -LEAST
        self.page = b""
        # A run that is not there is told before a server begins.
        self.folder, recipe, state = open_run(site, name)
        self.begun = state.starts[:1]
        self.evidence = Evidence(site, recipe)

    def get(self) -> bytes:
        """The page, some seconds old at most."""
        with self.lock:
            if self.clock() - self.made >= LEAST:
                folder, recipe, state = open_run(self.site, self.name)
                if state.starts[:1] != self.begun:  # another run under the name, of which nothing is known yet
                    self.folder, self.begun = folder, state.starts[:1]
                over = run_standing(state) == "finished"
                self.page = report_page(self.folder, recipe, state, None if over else OFTEN, self.evidence).encode()
                self.made = self.clock()
            return self.page


@contextmanager
def serving(pages: Pages, host: str = LOOPBACK, port: int = 0) -> Iterator[str]:
    """Serve the page as long as this lasts, and say where. Raises OSError where the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                page = pages.get()
            except Exception as error:  # storage that does not answer just now, above all
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=f"{type(error).__name__}: {error}")
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            with suppress(ConnectionError):  # a browser that has gone on
                self.wfile.write(page)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's
            """A terminal that says where the page is need not say who looks."""

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="watch", daemon=True)
    thread.start()
    try:
        yield f"http://{host}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
