"""A process that was asked to stop ends, though it hangs, and leaves word of where."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from cluster.leaving import FILE, TOLD

HANGS = """
import ctypes, sys
from pathlib import Path
from cluster.leaving import end_within

def leaving():
    end_within({seconds}, Path(sys.argv[1]))
    ctypes.PyDLL(None).sleep(60)  # a library that never gives Python back

leaving()
"""

SUPERVISED = """
import subprocess, sys
from cluster import supervisor

class Driver(subprocess.Popen):
    def __init__(self, command, **words):
        super().__init__([sys.executable, "-c", {hangs!r}, sys.argv[1]], **words)

supervisor.subprocess.Popen = Driver
sys.exit(supervisor.supervise(["train"]))
"""


def test_it_ends_in_time_and_says_where_it_stood(tmp_path: Path) -> None:
    began = time.monotonic()
    hangs = HANGS.format(seconds=TOLD + 1)
    process = subprocess.run([sys.executable, "-c", hangs, str(tmp_path / "logs")], check=False, timeout=30)
    assert process.returncode == -signal.SIGALRM
    assert time.monotonic() - began < TOLD + 20
    assert "in leaving" in (tmp_path / "logs" / FILE).read_text()


def test_nobody_is_started_in_its_place(tmp_path: Path) -> None:
    words = SUPERVISED.format(hangs=HANGS.format(seconds=1))
    process = subprocess.run([sys.executable, "-c", words, str(tmp_path)], check=False, timeout=30, capture_output=True)
    assert process.returncode == 128 + signal.SIGTERM
    assert b"another one" not in process.stdout
