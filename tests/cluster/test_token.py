"""A cluster that asks for a token is joined with the site's file, and refuses in words without it."""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.local import WrongToken, ray_running
from cluster.site import SiteError, load_site
from tests.heads import environment, example_site, head

pytestmark = pytest.mark.alone  # it starts a cluster

JOIN = """
import sys
from pathlib import Path
from cluster.local import WrongToken, ray_running

address, file, logs = sys.argv[1:]
try:
    with ray_running(address, 1, Path(logs), file or None):
        import ray
        print("joined", ray.get(ray.remote(lambda: 6 * 7).remote()))
except WrongToken as error:
    print(error)
"""


def test_a_token_file_without_an_address_is_refused(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('ray_token_file = "token"')
    with pytest.raises(
        SiteError, match="ray_token_file is for a cluster that asks for a token, and there is no ray_addr"
    ):
        load_site(str(tmp_path / "site.toml"))
    (tmp_path / "site.toml").write_text('ray_token_file = "token"\nray_address = "127.0.0.1:1"')
    assert load_site(str(tmp_path / "site.toml")).ray_token_file == str(tmp_path / "token"), "relative to the site file"


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), (" \n", "is empty")])
def test_a_token_file_that_holds_none_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    with (
        pytest.raises(WrongToken, match=rf"ray_token_file {file}.*{words}.*ray get-auth-token"),
        ray_running("127.0.0.1:1", 1, tmp_path / "logs", str(file)),
    ):
        pass


def test_the_right_token_joins_and_no_other(tmp_path: Path) -> None:
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for file in (right, wrong):
        file.write_text(secrets.token_hex(32) + "\n")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as session, head(right, session) as address:
        assert join(address, right, tmp_path / "logs") == "joined 42"
        assert (
            f"refuses this command (InvalidAuthToken: Authentication token is missing or incorrect): the token in {wrong} is "
            "not its own; copy the head's token there"
        ) in join(address, wrong, tmp_path / "logs")
        assert "the site names no ray_token_file" in join(address, None, tmp_path / "logs")
        left = trained(address, wrong, tmp_path)
        assert left.returncode == 2, left.stderr
        assert left.stderr.startswith(f"error: the Ray cluster at {address} refuses"), left.stderr
        assert "Traceback" not in left.stderr
        tokens = right.read_text().strip(), wrong.read_text().strip()
        written = [file for root in (tmp_path, Path(session)) for file in root.rglob("*") if file.is_file()]
        assert tmp_path / "logs" / "driver.log" in written
        for file in set(written) - {right, wrong}:
            text = file.read_text(errors="replace")
            assert not any(token in text for token in tokens), f"{file} holds a token"


def join(address: str, file: Path | None, logs: Path) -> str:
    """What a process says that joins with this file, in an environment that holds a token of its own."""
    command = [sys.executable, "-c", JOIN, address, str(file or ""), str(logs)]
    theirs = {"RAY_AUTH_TOKEN": "0" * 64} if file else {"HOME": str(logs)}
    done = subprocess.run(command, env=environment() | theirs, capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or done.stderr


def trained(address: str, file: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """`mllm train` on a site with this token file: the supervisor, and the driver that it starts."""
    site = example_site(folder, f'ray_address = "{address}"\nray_token_file = "{file}"\n')
    command = [sys.executable, "-m", "cluster.cli", "train", "vila_smoke", "--site", str(site)]
    return subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=240)
