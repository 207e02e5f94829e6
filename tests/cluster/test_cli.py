"""What a person gets who types something wrong: one line, before any worker starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import cli
from cluster.cli import main
from cluster.site import Site, SiteError, load_site
from mllm.recipe import dump
from mllm.recipes import by_name
from tests.conftest import CORPUS, ROOT


def mistake(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    error = capfd.readouterr().err  # also of the process that drives a run
    assert error.startswith("error: ")
    return error


SITE = f"""
runs = "runs"
cache = "cache"
[corpora]
example-pairs = "{CORPUS}/pairs/00000.tar"
[weights]
example-bpe = "{ROOT}/examples/tokenizer"
"""


@pytest.fixture
def site_file(tmp_path: Path) -> str:
    (tmp_path / "site.toml").write_text(SITE)
    return str(tmp_path / "site.toml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "vila_smok"], "did you mean vila_smoke"),
        (["train", "vila_smoke", "-s", "stages.algn.context=64"], "no stage 'algn'"),
        (["train", "vila_smoke", "--workers", "0"], "at least one worker"),
        (["train", "nowhere.json"], "no recipe file nowhere.json"),
        (["train", "vila_7b"], "reads corpus 'llava-cc3m-595k' and the site has ['example-pairs']"),
        (["status", "no-such-run"], "no run 'no-such-run'"),
        (["data", "check", "example-pears"], "no recipe reads a corpus 'example-pears'"),
        (["data", "preview", "vila_smoke", "--stage", "pretrian"], "its stages are ['align', 'pretrain', 'sft']"),
    ],
)
def test_a_mistake_is_told_in_one_line(
    words: list[str], told: str, site_file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert told in mistake([*words, "--site", site_file], capfd)


OF_RUNS = [
    ["status"], ["eval"], ["export"], ["report"], ["watch"], ["profile"], ["logs"], ["stop"], ["data", "quarantine"],
    ["compare", "another"],
]  # fmt: skip


@pytest.mark.parametrize("words", OF_RUNS, ids=" ".join)
def test_a_run_that_is_not_there_is_told_by_every_command(
    words: list[str], site_file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    told = mistake([*words, "no-such-run", "--site", site_file], capfd)
    assert "run" in told
    assert "no-such-run" in told or "another" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("words", [["submit", "vila_smoke"], ["logs", "x"], ["stop", "x"]], ids=" ".join)
def test_a_job_server_that_is_dead_is_told(words: list[str], site_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    run = Path(site_file).parent / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.json").write_text(dump(by_name("vila_smoke")))
    nobody = "http://127.0.0.1:4013"  # whose number holds that of a code, 401
    Path(site_file).write_text(f'jobs = "{nobody}"\n' + SITE)
    told = mistake([*words, "--site", site_file], capfd)
    assert f"the job server at {nobody} does not answer" in told
    assert "or mend jobs in the site file" in told
    assert "Traceback" not in told


def test_a_place_where_nothing_can_be_written_is_told(site_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A file where a folder should be: rights are of no account to root, who may run this."""
    blocked = Path(site_file).parent / "blocked"
    blocked.write_text("")
    told = mistake(["dashboard", "--out", str(blocked / "there")], capfd)
    assert told == f"error: {blocked}/there: Not a directory; check the path, here and in the site file\n"
    words = SITE.replace('runs = "runs"', f'runs = "{blocked}/runs"')
    Path(site_file).write_text(words)
    told = mistake(["train", "vila_smoke", "--site", site_file], capfd)
    assert f"{blocked}" in told
    assert "Traceback" not in told


def test_a_traceback_is_for_those_who_ask(site_file: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["status", "no-such-run", "--debug", "--site", site_file])
    assert end.value.code == 2
    told = capfd.readouterr().err
    assert told.startswith("Traceback")
    assert told.splitlines()[-1].startswith("error: no run 'no-such-run'")


@pytest.mark.parametrize("words", ["--help", "recipes", "recipes vila_smoke"])
def test_who_reads_on_no_longer_is_told_nothing(words: str) -> None:
    """`mllm recipes | head`: the pipe's other end is closed."""
    read, write = os.pipe()
    os.close(read)
    command = [str(Path(sys.executable).parent / "mllm"), *words.split()]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert ended.stderr == ""


def test_nobody_waits_for_what_a_command_does_not_need() -> None:
    """The process that keeps a driver alive reads no words of the command line; help imports neither torch nor Ray."""
    told = "print('tyro' in sys.modules, 'torch' in sys.modules, 'ray' in sys.modules)"
    code = f"import sys, cluster.cli; {told}; import cluster.commands; {told}"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["False False False", "True False False"]


def test_before_its_first_step_a_run_imports_nothing_that_it_does_not_need() -> None:
    """Ray Train's controller needs no torch; who deals packs knows nothing of what is learned; a driver shards no model and
    does not know what it is made of; neither it nor a worker foretells memory.
    """
    code = """
import sys
def there(*names):
    print(*(name for name in names if any(module == name or module.startswith(name + ".") for module in sys.modules)))
import cluster.group, cluster.enter, cluster.callbacks
there("ray.train", "torch")
from cluster.dealer import Dealer
dealer = Dealer()
there("pipelines.stream")
dealer.ready()
there("pipelines.stream", "mllm.recipe", "mllm.model")
import cluster.run, cluster.live, cluster.telemetry
there("mllm.recipe", "torch.distributed.tensor", "torch.distributed.checkpoint", "transformers", "cluster.memory")
import cluster.worker
there("torch.distributed.tensor", "ray.train.torch", "cluster.memory")
"""
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["ray.train", "", "pipelines.stream", "mllm.recipe", "torch.distributed.tensor"]


def test_a_fault_of_the_program_s_own_is_told_apart(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli._told(KeyError("encoder")) == 70
    told = capfd.readouterr().err
    assert told.startswith("error: KeyError: 'encoder'; this is a fault of mllm's own")
    assert "--debug" in told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("pairs/00000.tar", "pairs/{00000..00009}.tar", r"corpus 'example-pairs': no shard .*00005\.tar"),
        ("pairs/00000.tar", "nowhere/*.tar", r"corpus 'example-pairs': no file matches"),
        (f"{CORPUS}/pairs", "s4://bucket", "has the scheme 's4', which no storage here speaks"),
        (f"{ROOT}/examples/tokenizer", "/nowhere", r"should be a folder with a tokenizer\.json and /nowhere is none"),
        (f"{CORPUS}/pairs", "gs://bucket", r"gs://bucket/00000\.tar cannot be read here: .*gcsfs"),
        ('runs = "runs"', 'runs = "gs://bucket/runs"', "a disk that all nodes share, or on S3"),
        ("[weights]", "workers = 3\n[weights]", "corpora.workers"),
        ('cache = "cache"', "cache = ", "site.toml"),
        ('cache = "cache"', 'cash = "cache"', "cash"),
    ],
)
def test_a_site_that_does_not_hold_is_told_before_a_worker_starts(
    before: str, after: str, told: str, tmp_path: Path
) -> None:
    assert before in SITE
    (tmp_path / "site.toml").write_text(SITE.replace(before, after))
    recipe = by_name("vila_smoke")
    with pytest.raises(SiteError, match=told):
        load_site(str(tmp_path / "site.toml")).stream(recipe, recipe.stage("align"))


def test_without_a_site_the_example_corpus_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLLM_SITE", raising=False)
    assert "example-pairs" in load_site().corpora
    (tmp_path / "site.toml").write_text('runs = "elsewhere"')
    assert load_site() == Site(runs=str(tmp_path / "elsewhere"), cache=str(tmp_path / ".cache/mllm"))
    with pytest.raises(SiteError, match=r"no site file gone\.toml"):
        load_site("gone.toml")


def test_recipes_whose_names_begin_so_are_shown_together(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "cambrian_1", "--tree"])
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cambrian_1")]
    assert shown == ["cambrian_1_8b", "cambrian_1_13b", "cambrian_1_34b"]


def test_data_check_names_each_bad_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = tmp_path / "00000.tar"
    whole = (CORPUS / "pairs/00000.tar").read_bytes()
    shard.write_bytes(whole[:512] + bytes(1000) + whole[1512:])  # the first picture's beginning is gone
    (tmp_path / "site.toml").write_text(f'[corpora]\nexample-pairs = "{shard}"\n')
    with pytest.raises(SystemExit) as end:
        main(["data", "check", "example-pairs", "--site", str(tmp_path / "site.toml")])
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert told.splitlines()[0].startswith("example-pairs/00000.tar row 0: file is not an image")
    assert "91 good rows with 91 images in 1 shard, 1 bad (1.09%)" in told
