"""One controller writes a run at a time: also where two are started at once, clocks jump, and one was only asleep."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster import lease as leases
from cluster.journal import Fenced, Journal, LeaseTaken, RunFinished
from cluster.lease import Held, Lease, holder_of
from pipelines.place import Place

pytestmark = pytest.mark.alone  # a second counts

SILENCE = 1.0


@pytest.fixture
def run(anywhere: Place) -> Place:
    """The folder of a run."""
    return anywhere / "run"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Be another machine from here on: what it cannot know of this one's processes it must wait for."""
    return lambda name: monkeypatch.setattr(leases, "machine", lambda: name)


def test_a_second_controller_is_refused_and_told_by_whom(run: Place, elsewhere: Callable[[str], None]) -> None:
    first = Lease(run, SILENCE)
    elsewhere("another machine")
    with pytest.raises(Held, match=r"driven by process \d+ on .*--run"):
        Lease(run, SILENCE)
    first.journal.append(RunFinished(time=1.0))
    first.release()
    began = time.monotonic()
    second = Lease(run, SILENCE)
    assert time.monotonic() - began < SILENCE, "a lease that was given back is not waited for"
    assert second.token > first.token
    second.release()


def test_of_two_that_start_at_once_one_drives_and_the_other_learns_it(run: Place) -> None:
    with ThreadPoolExecutor(2) as pool:
        leased = list(pool.map(lambda _: _taken(run), range(2)))
    holders = [one for one in leased if one]
    newest = max(holders, key=lambda one: one.token)
    for one in holders:
        if one is newest:
            one.journal.append(RunFinished(time=1.0))
        else:
            with pytest.raises(Fenced, match="taken over"):
                one.journal.append(RunFinished(time=2.0))
            assert one.lost.wait(SILENCE)
    assert [event for event in Journal(run).events() if isinstance(event, RunFinished)] == [RunFinished(time=1.0)]
    newest.release()


def _taken(run: Place) -> Lease | None:
    try:
        return Lease(run, SILENCE)
    except Held:
        return None


def test_a_controller_that_was_asleep_writes_nothing_once_it_wakes(
    run: Place, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep = Lease(run, SILENCE)
    asleep.over.set()  # its process is stopped: it beats no more
    asleep.keeper.join()
    elsewhere("another machine")
    told: list[str] = []
    awake = Lease(run, SILENCE, told.append)
    assert "waiting 1 s" in told[0]
    with pytest.raises(Fenced):
        asleep.journal.append(RunFinished(time=1.0))
    monkeypatch.setattr(asleep, "lost", awake.over)
    holder = holder_of(run)
    assert holder is not None
    assert holder.token == awake.token
    awake.release()


def test_clocks_that_jump_change_nothing(
    run: Place, elsewhere: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Lease(run, SILENCE)
    elsewhere("another machine")
    for jump in (-1e6, 1e6):
        monkeypatch.setattr(time, "time", lambda jump=jump: 1.8e9 + jump)
        with pytest.raises(Held):
            Lease(run, SILENCE)
    first.journal.append(RunFinished(time=time.time()))
    assert not first.lost.is_set()
    first.release()


def test_the_lease_of_a_process_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    run = Place(tmp_path / "run")
    take = (
        "import os; from cluster.lease import Lease; from pipelines.place import Place; "
        f"Lease(Place({str(run)!r}), 60); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", take], check=False)
    assert any(isinstance(event, LeaseTaken) for event in Journal(run).events())
    began = time.monotonic()
    Lease(run, 60.0).release()
    assert time.monotonic() - began < 10
