"""The report of a run that goes, as a browser is served it; and runs laid over each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from invented import SCRIPT, evaluation, invented_run, step, troubled

from cluster.cli import main
from cluster.compare import compare, differences
from cluster.controller import RunError
from cluster.site import Site
from cluster.watch import LEAST, Pages, serving
from mllm.recipe import Recipe, override

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=120) as answer:
        assert answer.headers["Cache-Control"] == "no-store"
        return answer.read().decode()


def test_the_page_follows_the_run_and_stops_asking_at_its_end(site: Site, recipe: Recipe) -> None:
    run, _ = invented_run(Path(site.runs) / "night", recipe, "running")
    now = [0.0]
    pages = Pages(site, "night", clock=lambda: now[0])
    with serving(pages) as address:
        assert address.startswith("http://127.0.0.1:")
        first = get(address)
        assert '<meta http-equiv="refresh" content="10">' in first
        assert "<b>dog</b>" not in first, "what came from data is escaped"
        run.write_step("pretrain", step(21, 40))
        run.flush_steps()
        assert get(address) == first, "a page serves all who ask within some seconds"
        now[0] += LEAST
        assert get(address) != first
        run.write_evaluation(evaluation("pretrain", "during", 5.0, "an orange", 20))
        now[0] += LEAST
        assert re.search(r"pretrain, step 20</th>\s*<td><div>an orange</div>", get(address))
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(address + "etc/passwd")
        shutil.rmtree(run.root.path)
        invented_run(run.root.path, replace(recipe, name="other"), "failed", steps=6)
        now[0] += LEAST
        assert "of 6</span>" in get(address), "another run under the same name"

    invented_run(Path(site.runs) / "done", recipe, "finished")
    assert 'http-equiv="refresh"' not in Pages(site, "done").get().decode()
    with pytest.raises(RunError, match=r"no run 'day'.*there are: done, night"):
        Pages(site, "day")


def test_a_port_that_is_taken_is_told(
    site: Site, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    invented_run(Path(site.runs) / "night", recipe, "running")
    (tmp_path / "site.toml").write_text(f'runs = "{site.runs}"')
    with serving(Pages(site, "night")) as address:
        port = address.rstrip("/").rpartition(":")[2]
        with pytest.raises(SystemExit) as end:
            main(["watch", "night", "--port", port, "--site", str(tmp_path / "site.toml")])
    assert end.value.code == 2
    assert f"cannot listen at 127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_draws_its_charts(site: Site, recipe: Recipe, tmp_path: Path) -> None:
    assert CHROMIUM
    run, _ = invented_run(Path(site.runs) / "night", recipe, "running")
    run.write_evaluation(evaluation("align", "after", 6.0, SCRIPT))
    for done in (10, 20):
        run.write_evaluation(evaluation("pretrain", "during", 5.0, f"at {done} {SCRIPT}", done))
    troubled(run)
    invented_run(Path(site.runs) / "day", override(recipe, ["stages.align.ema=0.9"]), "running")
    other = compare(site, ["night", "day"]).write(tmp_path / "compare.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    words = [CHROMIUM, *options, "--virtual-time-budget=8000", "--dump-dom"]
    with serving(Pages(site, "night")) as address:
        for page in (address, other.as_uri()):
            shown = subprocess.run([*words, page], capture_output=True, text=True, timeout=120)
            assert shown.stdout.count("<svg") >= 2, shown.stderr[-500:]
            assert "vega-embed" in shown.stdout
            assert "taken over</title>" not in shown.stdout, "nothing that came from data runs"
            assert "Vega-Lite" not in shown.stderr, shown.stderr[-500:]
            if page == address:
                table = shown.stdout.partition('<article class="picture">')[2]
                assert table.index("at 20 &lt;script") < table.index("at 10 &lt;script"), "what it wrote, newest first"


def test_differences_of_recipes_are_told_by_the_names_that_change_them(recipe: Recipe) -> None:
    changed = override(recipe, ["stages.align.tune.connector.lr=1e-3", "seed=3"])
    found = differences([recipe, changed])
    assert [row[0] for row in found] == ["stages.align.tune.connector.lr", "seed"]
    for name, _, there in found:
        assert override(recipe, [f"{name}={there}"]) != recipe
    assert differences([recipe, replace(recipe, name="other")]) == []


def test_runs_are_compared_by_stage(
    site: Site, recipe: Recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    invented_run(Path(site.runs) / "night", recipe, "finished")
    invented_run(Path(site.runs) / "day", override(recipe, ["seed=3"]), "running")
    page = compare(site, ["night", "day"])
    assert [section.title for section in page.sections] == ["align", "pretrain", "sft", "recipes"]
    align, _, sft, recipes = page.sections
    assert [row[0] for row in align.tables[0].rows] == ["night", "day"]
    assert [row[0] for row in sft.tables[0].rows] == ["night"], "the other has not got there"
    assert recipes.tables[0].rows == (("seed", "0", "3"),)
    curves = align.figures[0].rows
    assert set(curves["name"]) == {"night", "day"}
    assert len(curves["step"]) == 80
    (tmp_path / "site.toml").write_text(f'runs = "{site.runs}"')
    main(["compare", "night", "day", "--out", str(tmp_path / "both.html"), "--site", str(tmp_path / "site.toml")])
    assert "seed" in capsys.readouterr().out
    assert "training loss" in (tmp_path / "both.html").read_text()
    with pytest.raises(ValueError, match="give the names of two runs or more"):
        compare(site, ["night", "night"])
