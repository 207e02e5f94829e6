"""A run as a job of a Ray cluster: submitted, read and stopped through the job server, which also serves the dashboard.

    [site.toml]
    jobs = "http://head:8265"

What travels is the code (the four packages), the recipe with all its values and the site with all its paths: the cluster needs
this project's dependencies and the same corpora, weights and folders, and nothing else. Keys of storage and tokens do not
travel: a job's package and environment can be read by everybody who sees the dashboard.

A run may be many jobs, one after the other: `RUN-1`, `RUN-2`. Each goes on where the journal says.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter
from rich.console import Console

from cluster.lease import holder_of, machine
from cluster.local import show_token
from cluster.site import Site
from cluster.versions import PACKAGES
from mllm.recipe import Recipe, dump
from pipelines.place import Place

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN = "mllm_run"
"""What a job's metadata calls the run's folder."""

OVER = 30.0
"""Seconds after a run's `notice` until a job that was asked to stop is ended."""

PATIENCE = 600.0
"""Seconds for which an answer of the cluster is waited for: a job may queue."""


class JobError(RuntimeError):
    """The job server does not answer, or has no such job, or one too many; in words for a person."""


def submit(
    recipe: Recipe, site: Site, name: str, console: Console, said: str | None = None, unchecked: bool = False
) -> str:
    """Submit the run `name` and return its job's id; `said` is the site file as the person named it.

    The cluster is asked first, by a job that holds nothing, unless the run is to be submitted `unchecked`. Raises JobError where
    the run is being trained, by a job or by hand, or no job server answers, and Unfit where the cluster could not train it.
    """
    client = _client(site)
    folder = Place(f"{site.runs}/{name}")
    jobs = _jobs(client, folder)
    if jobs and not jobs[-1].status.is_terminal():
        raise JobError(
            f"run {name!r} is being trained by job {jobs[-1].submission_id}; follow it (mllm logs {name} --follow), stop it "
            f"(mllm stop {name}), or choose another name with --run"
        )
    job = f"{name}-{1 + len(jobs)}"
    if not unchecked:
        from cluster.doctor import demand_of_jobs

        console.print("asking the cluster's nodes first", markup=False)
        demand_of_jobs(recipe, site, console)
    with packed(recipe, site) as package:
        client.submit_job(
            submission_id=job,
            entrypoint=f"python -m cluster.cli train recipe.json --site site.json --run {name} --unchecked",
            runtime_env={
                "working_dir": str(package),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{site.watch.notice + OVER:.0f}"},
            },
            metadata={RUN: str(folder), "mllm_recipe": recipe.name},
        )
    there = f" --site {said}" if said else ""
    console.print(f"run {name} is job {job}{': it goes on' if jobs or holder_of(folder) else ''}")
    for what, words in (
        ("dashboard", f"{_address(site)}/#/jobs/{job}"),
        ("follow", f"mllm logs {name}{there} --follow"),
        ("status", f"mllm status {name}{there}"),
        ("stop", f"mllm stop {name}{there}"),
    ):
        console.print(f"{what:<10} {words}", soft_wrap=True)
    if site.storage.key or site.storage.secret:
        console.print("keys under [storage] were not sent: the cluster's own AWS environment, profile or role must do")
    return job


def asked(recipe: Recipe | None, site: Site, words: Sequence[str], begins: str) -> str:
    """Have the cluster run `mllm WORDS`, with the recipe and the site, and return the last line of what it printed that `begins`
    so. Raises JobError where it ends without one, or not within `PATIENCE` seconds.
    """
    client = _client(site)
    given = ["recipe.json"] if recipe is not None else []
    command = " ".join([words[0], *given, *words[1:], "--site", "site.json"])
    with packed(recipe, site) as package:
        job = client.submit_job(
            entrypoint=f"python -m cluster.cli {command}", runtime_env={"working_dir": str(package)}
        )
    try:
        _await(
            lambda: client.get_job_status(job).is_terminal(), PATIENCE, f"job {job} (mllm {words[0]})", "did not end"
        )
    except JobError:
        client.stop_job(job)
        raise
    told = client.get_job_logs(job)
    lines = [line for line in told.splitlines() if line.startswith(begins)]
    if not lines:
        raise JobError(f"mllm {words[0]} as job {job} of the cluster said nothing of use; it printed: {told[-2000:]}")
    return lines[-1]


@contextmanager
def packed(recipe: Recipe | None, site: Site) -> Iterator[Path]:
    """A folder with all that a cluster needs to train `recipe`, as long as it takes to send it."""
    root = Path(__file__).resolve().parent.parent
    with TemporaryDirectory(prefix="mllm-job-") as there:
        package = Path(there)
        for name in PACKAGES:
            shutil.copytree(root / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        if recipe is not None:
            (package / "recipe.json").write_text(dump(recipe), encoding="utf-8")
        sent = replace(
            site,
            ray_address="auto",
            ray_token_file=None,
            jobs=None,
            storage=replace(site.storage, key=None, secret=None),
        )
        (package / "site.json").write_bytes(TypeAdapter(Site).dump_json(sent, indent=1))
        yield package


def logs(site: Site, name: str, follow: bool, console: Console) -> None:
    """Print what the run's newest job has printed, and with `follow` what it goes on to print until it ends.

    Of a run that was never a job its driver's log file is printed. Raises JobError where there is neither.
    """
    from cluster.metrics import RunFolder

    folder = RunFolder(f"{site.runs}/{name}")
    job = newest(site, folder.root) if site.jobs else None
    if job is None:
        file = folder.logs / "driver.log"
        if not file.is_file():
            where = (
                f"the job server at {_address(site)} knows no job of it"
                if site.jobs
                else "the site names no jobs address"
            )
            raise JobError(f"run {name!r} has no logs here: {where}, and there is no {file}")
        console.print(file.read_text(errors="replace"), end="", soft_wrap=True, markup=False)
        return
    client = _client(site)
    assert job.submission_id
    if not follow:
        console.print(client.get_job_logs(job.submission_id), end="", soft_wrap=True, markup=False)
        return

    async def tail() -> None:
        async for text in client.tail_job_logs(job.submission_id or ""):
            console.print(text, end="", soft_wrap=True, markup=False)

    asyncio.run(tail())


def stop(site: Site, name: str, console: Console) -> None:
    """Have the run save and stop, and wait until it has: through the job server, or by a signal to a driver on this machine.

    Raises JobError where nobody drives the run, or somebody whom neither reaches.
    """
    folder = Place(f"{site.runs}/{name}")
    if not (folder / "recipe.json").is_file():
        raise JobError(f"no run {name!r} in {site.runs}")
    patience = site.watch.notice + OVER
    job = newest(site, folder) if site.jobs else None
    if job and not job.status.is_terminal():
        client = _client(site)
        assert job.submission_id
        client.stop_job(job.submission_id)
        _await(
            lambda: client.get_job_status(job.submission_id or "").is_terminal(), patience, f"job {job.submission_id}"
        )
        console.print(f"job {job.submission_id} has stopped; mllm submit goes on with run {name}")
        return
    holder = holder_of(folder)
    if holder is None or holder.gone():
        raise JobError(f"run {name!r} is not being trained; nothing to stop")
    if holder.host != machine():
        raise JobError(
            f"run {name!r} was last driven by {holder.words}, and this is {machine()}: stop it there (kill {holder.pid}); where "
            "it was submitted to a cluster, the site file must say jobs"
        )
    os.kill(holder.pid, signal.SIGTERM)
    _await(holder.gone, patience, holder.words)
    console.print(f"{holder.words} has stopped; the same command goes on with run {name}")


def newest(site: Site, folder: Place) -> JobDetails | None:
    """The last job that trained the run in `folder`, if there was one."""
    jobs = _jobs(_client(site), folder)
    return jobs[-1] if jobs else None


def standing(site: Site, folder: Place) -> str:
    """The run's newest job in a line; empty where it never was one."""
    job = newest(site, folder)
    if job is None:
        return ""
    return f"job {job.submission_id}: {str(job.status.value).lower()}; {_address(site)}/#/jobs/{job.submission_id}"


def _jobs(client: JobSubmissionClient, folder: Place) -> list[JobDetails]:
    """Jobs of the run, oldest first."""
    of_it = [job for job in client.list_jobs() if (job.metadata or {}).get(RUN) == str(folder) and job.submission_id]
    return sorted(of_it, key=lambda job: job.start_time or 0)


def _address(site: Site) -> str:
    return (site.jobs or "").rstrip("/")


def _client(site: Site) -> JobSubmissionClient:
    """The site's job server. Raises JobError where none answers, it refuses the token, or it is of another release of Ray."""
    if not site.jobs:
        raise JobError('the site names no job server; add jobs = "http://HEAD:8265" to the site file')
    if site.ray_token_file:
        show_token(site.ray_token_file)
    import ray
    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(site.jobs)
        theirs = str(client._server_ray_version)  # `get_version` tells the API's
    except Exception as error:  # requests, Ray and its authentication each have their own
        said = str(error).strip().splitlines()
        # A code is a word of its own: a port's number may hold one.
        refused = re.search(r"\b40[13]\b|authenticat|token", str(error).lower())
        mend = (
            "copy the head's token (on the head: ray get-auth-token) into a file, and name that with ray_token_file in the site"
            if refused
            else "start the cluster with its dashboard (ray[default] installed, ray start --head), or mend jobs in the site file"
        )
        verb = "refuses this command" if refused else "does not answer"
        raise JobError(
            f"the job server at {site.jobs} {verb} ({said[0] if said else type(error).__name__}); {mend}"
        ) from error
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise JobError(
            f"the cluster at {site.jobs} runs Ray {theirs} and this machine Ray {ray.__version__}: the order of packs rests on "
            "details of one release; install the same on both"
        )
    return client


def _await(over: Any, seconds: float, what: str, late: str = "was asked to stop and has not") -> None:
    end = time.monotonic() + seconds
    while not over():
        if time.monotonic() > end:
            raise JobError(f"{what} {late} within {seconds:.0f} s; see mllm status and the dashboard")
        time.sleep(0.5)
