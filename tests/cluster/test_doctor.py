"""What is thought of a cluster, from answers of its nodes; and the table of this machine, as a person sees it."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.bandwidth import Speed
from cluster.cli import main
from cluster.finding import Finding, Unfit
from cluster.indexing import corpora_of
from cluster.site import Annotators, Site
from cluster.survey import Errand, NodeReport, Rights, report, rights
from cluster.verdicts import cpus, devices, differing, link, memory_of, silent, storages
from cluster.versions import code, versions
from mllm.recipe import Recipe
from mllm.recipes import by_name
from pipelines.storage import Storage
from tests.conftest import ROOT
from tests.s3 import BUCKET, Server

HERE = {"python": "3.11.7", "torch": "2.13.0+cpu", "ray": "2.60.0", "transformers": "5.23.0", "tokenizers": "0.23.3"}
HERE |= {"numpy": "2.4.6", "mllm": "0.1.0"}
SOUND = NodeReport(node="10.0.0.1", host="one", versions=HERE, code="abc")


def of(found: list[Finding], what: str) -> Finding:
    return next(one for one in found if one.what == what)


def test_the_same_build_for_another_device_is_the_same_version() -> None:
    gpu = replace(SOUND, node="10.0.0.2", versions=HERE | {"torch": "2.13.0+cu128"})
    (fine,) = differing([SOUND, gpu], HERE, "abc")
    assert fine.found.startswith("the same on all 2: python 3.11.7, torch 2.13.0+cpu")
    old = replace(gpu, versions=HERE | {"torch": "2.12.0", "ray": "2.59.0"})
    (wrong,) = differing([SOUND, old], HERE, "abc")
    assert wrong.fatal
    assert (wrong.what, wrong.found) == (
        "versions on 10.0.0.2",
        "torch 2.12.0 (here 2.13.0+cpu), ray 2.59.0 (here 2.60.0)",
    )
    (wrong,) = differing([replace(gpu, code="def")], HERE, "abc")
    assert "other source files (def, here abc)" in wrong.found


def test_a_node_that_is_silent_or_lacks_the_project_stops_a_run() -> None:
    late = replace(SOUND, trouble="did not answer within 90 s")
    bare = replace(SOUND, node="10.0.0.2", trouble="No module named 'cluster'")
    found = list(silent([SOUND, late, bare]))
    assert [one.fatal for one in found] == [True, True]
    assert "start Ray on it again" in found[0].advice
    assert found[1].advice == "install mllm there as it is here"


@pytest.mark.parametrize(
    ("site", "gpus", "mark", "words"),
    [
        (Site(workers=2), False, "ok", "2 trainers x 1 + 1 preprocessor x 1 = 3 CPUs of the cluster's 4"),
        (Site(workers=5), False, "stops", "take fewer workers, or add nodes: 1 CPUs are wanting"),
        (
            Site(workers=5, grows=True),
            False,
            "note",
            "= 6 CPUs of the cluster's 4; the run waits until nodes have come",
        ),
        (Site(workers=4), False, "note", "share the trainers'"),
        (Site(workers=(2, 8)), False, "note", "at most 8 trainers x 1 + 1 preprocessor x 1 = 9 CPUs"),
        (Site(workers=(2, 8), grows=True), False, "ok", "2 trainers x 1"),
        (Site(workers=8, preprocessors=4), True, "ok", "8 trainers x 0 + 4 preprocessors x 1 = 4 CPUs"),
    ],
)
def test_the_sum_of_cpus_is_told(site: Site, gpus: bool, mark: str, words: str) -> None:
    (found,) = cpus(site, None, gpus, {"CPU": 4.0, "GPU": 0.0})
    assert found.mark == mark
    assert words in f"{found.found}; {found.advice}"


def test_gpus_are_counted_with_those_of_annotators() -> None:
    site = Site(workers=(4, 8), annotators=Annotators(actors=2, gpus=0.5))
    (short,) = devices(site, True, {"GPU": 4.0})
    assert short.fatal
    assert "4 trainers x 1 + 1 for annotators = 5 of the cluster's 4" in short.found
    assert not next(iter(devices(replace(site, grows=True), True, {"GPU": 4.0}))).fatal
    (fewer,) = devices(site, True, {"GPU": 6.0})
    assert fewer.mark == "note"
    (idle,) = devices(site, False, {"GPU": 6.0})
    assert idle.advice == "say gpus = true in the site file, if they should"
    assert list(devices(site, False, {"GPU": 0.0})) == []


def test_a_disk_that_is_not_shared_and_storage_without_conditions_are_told() -> None:
    good = Rights(folder="/runs", writes=1e8, reads=2e8)
    one = replace(SOUND, rights=(good, good))
    two = replace(SOUND, node="10.0.0.2", rights=(replace(good, shared=False), replace(good, exclusive=False)))
    found = list(storages([one, two], Site(runs="/runs", cache="/cache")))
    apart = of(found, "runs")
    assert apart.fatal
    assert apart.found == "/runs on 10.0.0.2 is not the one that is here"
    assert "If-None-Match" in of(found, "cache").advice
    slow = replace(SOUND, rights=(replace(good, writes=1e6), good))
    assert of(list(storages([slow], Site())), "runs").advice.startswith("slow")


def test_memory_that_no_gpu_has_stops_a_run(recipe: Recipe) -> None:
    site = Site(workers=1)
    small = list(memory_of(recipe, site, [2**20, 2**40]))
    assert {one.mark for one in small} == {"stops"}
    assert "foretold, and the smallest GPU has 1.0 MiB" in small[0].found.replace("1 MiB", "1.0 MiB")
    assert {one.mark for one in memory_of(recipe, site, [2**40])} == {"ok"}


def test_links_that_fail_or_are_thin_are_told() -> None:
    assert link(Speed(ranks=2, library="gloo", rate=2e8), 2).mark == "ok"
    assert link(Speed(ranks=2, library="nccl", rate=2e8), 2).mark == "note"
    broken = link(Speed(ranks=2, library="nccl", trouble="timed out"), 2)
    assert broken.fatal
    assert "NCCL_SOCKET_IFNAME" in broken.advice


def test_a_node_tells_what_it_may_do_on_a_disk_and_on_s3(tmp_path: Path, s3: Server) -> None:
    """Its own answer, without Ray: keys that are wrong, a corpus that is not there, and nothing left behind."""
    shut = tmp_path / "file"
    shut.write_bytes(b"")
    gone = {"pages": f"{tmp_path}/gone.jsonl", "pairs": str(ROOT / "examples/corpus/pairs/00000.tar")}
    folders = (f"{tmp_path}/runs", f"{shut}/runs", f"s3://{BUCKET}/doctor")
    hasty = replace(s3.storage, patience=0.0)
    told = report("here", Errand(storage=hasty, folders=folders, seen=("", "", ""), corpora=gone))
    disk, wrong, bucket = told.rights
    assert (disk.trouble, disk.exclusive, bucket.trouble, bucket.exclusive) == ("", True, "", True)
    assert disk.writes > 0
    assert bucket.reads > 0
    assert wrong.trouble.startswith("NotADirectoryError")
    assert told.corpora[0].trouble.startswith("FileNotFoundError")
    assert told.corpora[1].reads > 0
    assert (told.versions, told.code, told.host) == (versions(), code(), socket.gethostname())
    assert list((tmp_path / "runs").iterdir()) == []
    stranger = Errand(
        storage=replace(hasty, secret="wrong"), folders=(f"s3://{BUCKET}/doctor",), seen=("",), corpora={}
    )
    assert report("here", stranger).rights[0].trouble.startswith("PermissionError")
    from pipelines import storage

    storage.use(Storage())
    assert not rights(str(tmp_path / "runs"), seen=str(tmp_path / "not-seen")).shared


def test_the_reasons_are_told_all_at_once() -> None:
    found = [Finding(what="CPUs", found="9 of 3", advice="fewer", fatal=True), Finding(what="ok", found="fine")]
    found.append(Finding(what="runs", found="shut", advice="open it", fatal=True))
    words = "2 things stand in its way (mllm doctor shows the rest):\n  CPUs: 9 of 3; fewer\n  runs: shut; open it"
    assert str(Unfit(found)).endswith(words)


def test_the_table_of_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "site.toml").write_text(f'[corpora]\nexample-pairs = "{tmp_path}/gone.tar"\n')
    words = ["doctor", "vila_smoke", "--site", str(tmp_path / "site.toml")]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 1
    shown = capsys.readouterr().out
    assert f"{os.cpu_count()}" in shown
    assert "stops" in shown
    with pytest.raises(SystemExit):
        main([*words, "--json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    fatal = {one["what"] for one in found if one["fatal"]}
    assert fatal == {f"corpus {corpus.name}" for corpus in corpora_of(by_name("vila_smoke"))}
