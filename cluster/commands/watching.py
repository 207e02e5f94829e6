"""Runs as a person sees them: pages, profiles, dashboards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cluster.commands.words import RunName, SiteFile, plain_console, site_of


@dataclass
class Report:
    """Write a run's report again."""

    run: RunName
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.evidence import Evidence
        from cluster.report import write_report
        from cluster.run import open_run

        site = site_of(self.site)
        folder, recipe, state = open_run(site, self.run)
        print(write_report(folder, recipe, state, Evidence(site, recipe)))


@dataclass
class Watch:
    """Serve a run's report to a browser while it goes: losses, throughput, workers, faults, dropped rows, what it writes."""

    run: RunName
    host: str = "127.0.0.1"
    """The address to listen at; others than this machine reach it only where this says so."""
    port: int = 8266
    site: SiteFile = None

    def __call__(self) -> None:
        import time

        from cluster.watch import Pages, serving

        pages = Pages(site_of(self.site), self.run)
        try:
            with serving(pages, self.host, self.port) as address:
                print(f"{self.run} at {address} (Ctrl-C ends)", flush=True)
                while True:
                    time.sleep(3600)
        except OSError as error:
            raise ValueError(f"cannot listen at {self.host}:{self.port}: {error}; take another --port") from error


@dataclass
class Profile:
    """Look into a run that goes: a trace of a rank's next steps, and where its threads stand. Nothing is restarted."""

    run: RunName
    rank: int = 0
    steps: int = 5
    wait: float = 300.0
    """Seconds to wait for the answer."""
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.run import profile_run

        profile_run(site_of(self.site), self.run, self.rank, self.steps, self.wait, plain_console())


@dataclass
class Compare:
    """Lay runs over each other: losses and throughput by stage on one page, and in what their recipes differ."""

    runs: Positional[tuple[str, ...]]
    out: Path = Path("compare.html")
    site: SiteFile = None

    def __call__(self) -> None:
        from cluster.compare import compare, show

        page = compare(site_of(self.site), self.runs)
        show(page, plain_console())
        print(f"page: {page.write(self.out)}")


@dataclass
class Dashboard:
    """Write a Grafana dashboard of what runs export to Prometheus, and alert rules, to be laid beside Ray's own."""

    out: Path = Path("grafana")

    def __call__(self) -> None:
        from cluster.grafana import write

        print(*write(self.out), sep="\n")
