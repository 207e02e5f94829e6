"""The batch script, run with the commands of Slurm and Ray played by others, which write down how they were called."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.manifests.write import manifest
from cluster.site import Site
from mllm.recipes import by_name
from tests.cluster.test_manifests import SITE, deployed, trainers, with_corpora

SRUN = """#!/bin/bash
echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""

RAY = """#!/bin/bash
trap 'echo "ray ended" >> "$CALLS"; kill $!; exit 0' TERM
[ "$1" = start ] && sleep 60 > /dev/null 2>&1 &
echo "ray $* [token of $(wc -c < "$RAY_AUTH_TOKEN_PATH")] [$RAY_AUTH_MODE]" >> "$CALLS"
[ "$1" != start ] || wait
"""

MLLM = """#!/bin/bash
echo "mllm $* [$RAY_ADDRESS]" >> "$CALLS"
until [ "$(grep -c '^ray start' "$CALLS")" -ge "$STARTED" ]; do sleep 0.02; done
[ -z "$WAITS" ] && exit "$CODE"
trap 'echo "asked to stop" >> "$CALLS"; sleep 0.3; echo "saved" >> "$CALLS"; kill $!; exit 143' TERM
sleep 60 > /dev/null 2>&1 &
echo ready > "$WAITS"
wait
"""

PLAYED = {
    "srun": SRUN,
    "ray": RAY,
    "mllm": MLLM,
    "hostname": "#!/bin/bash\necho fd00::1 10.0.0.7 10.1.0.7\n",
    "scontrol": '#!/bin/bash\necho "scontrol $*" >> "$CALLS"\n[ "$1" = requeue ] || printf "%s\\n" $NODES\n',
}


class Job:
    """A job as Slurm would start it: in the folder that it was submitted from, on `nodes`."""

    def __init__(self, folder: Path, site: Site, nodes: str, code: int = 0, waits: bool = False) -> None:
        recipe = by_name("vila_7b")
        files = manifest(recipe, with_corpora(site, recipe), "slurm", "a run").files
        for name, text in files.items():
            (folder / name).write_text(text)
        played = folder / "bin"
        played.mkdir()
        for name, text in PLAYED.items():
            (played / name).write_text(text)
            (played / name).chmod(0o755)
        self.calls, self.ready, self.folder = folder / "calls", folder / "ready", folder
        self.calls.touch()
        self.environment = {
            "PATH": f"{played}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "NODES": nodes,
            "STARTED": str(min(2, len(nodes.split()))),
            "CODE": str(code),
            "WAITS": str(self.ready) if waits else "",
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-9]",
            "SLURM_SUBMIT_DIR": str(folder),
        }

    def begin(self) -> subprocess.Popen[str]:
        command = ["bash", str(self.folder / "job.sbatch")]
        return subprocess.Popen(
            command, env=self.environment, text=True, stderr=subprocess.PIPE, start_new_session=True
        )

    def run(self) -> int:
        process = self.begin()
        self.end(process)
        return process.returncode

    def end(self, process: subprocess.Popen[str]) -> str:
        """What it said of its errors; none of its processes is left."""
        try:
            return process.communicate(timeout=60)[1]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise

    @property
    def said(self) -> list[str]:
        return self.calls.read_text().splitlines()


def test_head_and_workers_start_by_srun_and_end_with_the_run(tmp_path: Path) -> None:
    job = Job(tmp_path, SITE, "node1 node2 node3")
    assert job.run() == 0
    head, others = (line for line in job.said if line.startswith("srun") and "ray start" in line)
    assert "--nodelist=node1 " in head
    assert "--cpus-per-task=96" in head
    assert "ray start --head --block --node-ip-address=10.0.0.7 --port=23456" in head
    assert "--nodes=2 --ntasks=2" in others
    assert "--exclude=node1 " in others
    assert "ray start --block --address=10.0.0.7:23456 --num-cpus=96 --num-gpus=8" in others
    assert f"mllm train {tmp_path}/recipe.json --site {tmp_path}/site.toml --run a run [10.0.0.7:23456]" in job.said
    assert job.said.count("ray ended") == 2
    assert not [line for line in job.said if "requeue" in line]


def test_one_node_is_head_and_worker(tmp_path: Path) -> None:
    job = Job(tmp_path, replace(SITE, workers=8), "node1")
    assert job.run() == 0
    assert len([line for line in job.said if line.startswith("srun") and "ray start" in line]) == 1


def test_each_job_has_a_token_of_its_own_that_goes_with_it(tmp_path: Path) -> None:
    job = Job(tmp_path, SITE, "node1 node2")
    assert job.run() == 0
    shown = [line for line in job.said if line.startswith("ray ") and line != "ray ended"]
    assert shown
    assert all("[token of 64] [token]" in line for line in shown)
    assert not list(tmp_path.glob("ray-token*"))


def test_a_token_that_the_site_names_is_taken_and_stays(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("x" * 10)
    job = Job(tmp_path, replace(SITE, ray_address="auto", ray_token_file=str(tmp_path / "token")), "node1")
    assert job.run() == 0
    assert [line for line in job.said if "[token of 10] [token]" in line]
    assert (tmp_path / "token").is_file()


def test_told_that_its_time_is_over_it_saves_and_is_queued_again(tmp_path: Path) -> None:
    job = Job(tmp_path, SITE, "node1 node2", waits=True)
    process = job.begin()
    deadline = time.monotonic() + 30
    while not job.ready.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    job.end(process)
    assert process.returncode == 143
    said = [line for line in job.said if not line.startswith(("srun", "mllm"))]
    assert said.index("asked to stop") < said.index("saved") < said.index("ray ended")
    assert said[-1] == "scontrol requeue 123456"


@pytest.mark.parametrize("code", [2, 70])
def test_a_run_that_fails_is_not_queued_again(code: int, tmp_path: Path) -> None:
    job = Job(tmp_path, SITE, "node1 node2", code=code)
    assert job.run() == code
    assert not [line for line in job.said if "requeue" in line]


def test_a_job_submitted_from_elsewhere_says_so(tmp_path: Path) -> None:
    job = Job(tmp_path, SITE, "node1")
    (tmp_path / "recipe.json").unlink()
    process = job.begin()
    assert "submit from this script's folder" in job.end(process)
    assert process.returncode == 2
    assert job.said == []


def test_what_slurm_is_asked_for() -> None:
    recipe = by_name("vila_7b")
    assert SITE.deploy
    site = deployed(
        SITE, slurm=replace(SITE.deploy.slurm, partition="gpu", account="team"), activate="source /opt/x/bin/activate"
    )

    def asked(site: Site) -> list[str]:
        text = manifest(recipe, with_corpora(site, recipe), "slurm", "run").files["job.sbatch"]
        assert "source /opt/x/bin/activate\n" in text
        return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]

    lines = asked(site)
    assert {"nodes=1-4", "gpus-per-node=8", "mem=900G", "requeue"} <= set(lines)
    assert {"signal=B:TERM@180", "partition=gpu", "account=team"} <= set(lines)
    assert "nodes=2" in asked(replace(site, workers=16))
    assert not [line for line in asked(trainers(site, gpus=0)) if "gpus" in line]
