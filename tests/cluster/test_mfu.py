"""What devices could compute, and what of it a step's record tells."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster.amounts import flop_words
from cluster.charts import GAUGES, gauges_of
from cluster.live import utilised
from cluster.metrics import RunFolder, StepRecord, parse_step, utilisation
from cluster.mfu import gpu_peak, peak_flops
from cluster.phases import Phases
from cluster.views import StageView
from tests.cluster.invented import step


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10G", 0.0),  # another chip, whatever its name begins with
        ("Somebody's GPU", 0.0),
    ],
)
def test_gpus_are_known_by_their_names(name: str, peak: float) -> None:
    assert gpu_peak(name) == peak


def test_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), "float32") < 1e14


def known(number: int) -> StepRecord:
    """A step of half a second on two ranks that could do 1e12 a second each: 0.4e12 of 1e12."""
    return replace(step(number, 10), flops=4e11, hardware_flops=5e11, peak=1e12)


def test_utilisation_is_what_was_needed_by_what_could_be() -> None:
    assert known(1).mfu == pytest.approx(0.4)
    assert utilisation([known(1), replace(known(2), seconds=1.5)]) == pytest.approx(0.2)
    assert utilisation([known(1), step(2, 10)]) == pytest.approx(0.4)  # a step that knows nothing says nothing
    assert step(1, 10).mfu is None
    assert replace(known(1), peak=0.0).mfu is None


def test_records_survive_their_file_and_old_ones_are_read(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.write_step("align", known(1))
    assert run.steps("align") == [known(1)]
    line = run.steps_file("align").read_bytes()
    old = line.split(b',"flops"')[0] + b"}"
    assert old != line
    assert parse_step(old) == replace(step(1, 10), usual=Phases(), slowest=None)


def test_a_step_of_no_number_is_told_as_such(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    broken = replace(known(1), loss=math.nan, grad_norm=math.inf, taken=False)
    run.write_step("align", broken)
    (read,) = run.steps("align")
    assert math.isnan(read.loss)
    assert (read.grad_norm, read.taken) == (math.inf, False)


def test_views_show_it_where_it_is_known() -> None:
    view = StageView(name="align", steps=[known(1), known(2)])
    assert "800 GFLOP/s  mfu 40.0%" in utilised(view)
    assert {gauge.column: gauge.value(view) for gauge in gauges_of(view)}["mfu"] == "mean 40.0%"
    assert gauges_of(view) == list(GAUGES)
    old = StageView(name="align", steps=[step(1, 10)])
    assert utilised(old) == ""
    assert not {"mfu", "flops"} & {gauge.column for gauge in gauges_of(old)}


@pytest.mark.parametrize(
    ("value", "words"), [(3.12e14, "312 TFLOP"), (8.56e16, "85.6 PFLOP"), (1.2e21, "1.2 ZFLOP"), (5.0, "5 FLOP")]
)
def test_flops_have_their_units(value: float, words: str) -> None:
    assert flop_words(value) == words
