"""What a check has found, as a value, and many of them as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pipelines.types import spec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@spec
class Finding:
    """One line: what was looked at, what was found, and -- where it matters -- what to do. `fatal` stops training."""

    what: str
    found: str
    advice: str = ""
    fatal: bool = False

    @property
    def mark(self) -> str:
        """`stops`, `note` or `ok`."""
        return "stops" if self.fatal else "note" if self.advice else "ok"


class Unfit(ValueError):
    """A run cannot begin, and these are all the reasons that could be found before it does."""

    def __init__(self, findings: Iterable[Finding]) -> None:
        self.findings = tuple(one for one in findings if one.fatal)
        words = "".join(f"\n  {one.what}: {one.found}; {one.advice}" for one in self.findings)
        count = "one thing stands" if len(self.findings) == 1 else f"{len(self.findings)} things stand"
        super().__init__(f"the run cannot begin, {count} in its way (mllm doctor shows the rest):{words}")


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print findings as a table; off a terminal as lines, which can be searched."""
    if console.is_terminal:
        console.print(table(findings))
        return
    for one in findings:
        words = one.found + (f"; {one.advice}" if one.advice else "")
        console.print(f"{one.mark:<6} {one.what:<34} {words}", markup=False, soft_wrap=True)


def table(findings: Sequence[Finding]) -> Table:
    """Findings as a person reads them."""
    from rich.markup import escape
    from rich.table import Table

    colours = {"stops": "bold red", "note": "yellow", "ok": "green"}
    shown = Table("", "what", "found", "what to do", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    shown.columns[1].no_wrap = True
    for one in findings:
        mark = f"[{colours[one.mark]}]{one.mark}[/]"
        shown.add_row(mark, escape(one.what), escape(one.found), escape(one.advice))
    return shown
