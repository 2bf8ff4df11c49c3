"""The kernels' benchmark, tried on a CPU: every case runs, is checked, and leaves what its table needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpu import command
from gpu.cases import CASES, Bar, memory_formula_bytes, ppo_formula_bytes
from gpu.ceilings import Part, total_ms
from gpu.shapes import SHAPES, Shape
from gpu.timing import Stopwatch, Way
from harness.machine import ROOT
from table import everything, headlines, load

WITHOUT_A_GPU = {"liger", "cut-cross-entropy", "verl"}
BARE = """
import runpy, sys
for name in ("pydantic", "grpc", "transformers", "redis"):
    sys.modules[name] = None
sys.argv = ["run.py", "--tiny", *sys.argv[1:]]
try:
    runpy.run_path("benchmarks/gpu/run.py", run_name="__main__")
finally:
    print([name for name in sys.modules if name.startswith("rlhf.") and not name.startswith("rlhf.ops")])
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """From where the packages of the services are not installed."""
    out = tmp_path_factory.mktemp("kernels")
    results = ROOT / "benchmarks" / "results"
    before = {path: path.read_bytes() for path in results.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", BARE, "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "[]", "the kernels' benchmark needs the kernels alone"
    assert {path: path.read_bytes() for path in results.iterdir()} == before
    return json.loads((out / "kernels-gpu.json").read_text()) | {"folder": out}


def test_every_case_is_measured(result):
    assert [entry["case"] for entry in result["cases"]] == [case.name for case in CASES]
    assert result["quick"]
    for entry in result["cases"]:
        own = entry["providers"]["ours"]
        assert own["median_ms"] > 0
        assert own["quantile_20_ms"] <= own["median_ms"] <= own["quantile_80_ms"]
        assert not entry["judged"]
        assert "profile" not in entry


def test_a_peer_that_is_not_there_is_named_with_the_reason(result):
    names = {name: found for entry in result["cases"] for name, found in entry["providers"].items()}
    peers = {name: found for name, found in names.items() if name.split()[0] in WITHOUT_A_GPU}
    assert {name.split()[0] for name in peers} == WITHOUT_A_GPU
    assert all(found["absent"] == "needs a GPU" for found in peers.values())
    others = names.keys() - peers.keys()
    assert others
    assert not any("absent" in names[name] for name in others)


def test_everybody_is_checked_against_float64(result):
    for entry in result["cases"]:
        found = entry["providers"]["ours"]["largest_errors"]
        assert found, entry["case"]
        gradients = [error for name, error in found.items() if "largest" in name]
        assert bool(gradients) == (CASES[result["cases"].index(entry)].loss is not None)
        assert all(error < 0.01 for error in gradients), entry["case"]
        assert all(error < 1e-3 for name, error in found.items() if "largest" not in name), entry["case"]


def test_a_ceiling_is_the_sum_of_its_parts(result):
    for entry in result["cases"]:
        if entry["ceiling"] is not None:
            parts = entry["ceiling"]["parts"].values()
            assert entry["ceiling"]["ms"] == pytest.approx(sum(part["times"] * part["median_ms"] for part in parts))
            share = next(bar for bar in entry["bars"] if bar["name"] == "share of the ceiling")
            assert share["value"] == pytest.approx(entry["ceiling"]["ms"] / entry["providers"]["ours"]["median_ms"])


def test_the_tables_show_it(result):
    results = load(result["folder"])
    assert "quick sizes: no measurement" in headlines(results)
    table = everything(results)
    assert "### kernels-gpu" in table
    assert all(figure["name"] in table for figure in result["figures"])


def test_without_out_nothing_is_written(tmp_path, monkeypatch, capsys):
    before = sorted((ROOT / "benchmarks" / "results").iterdir())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--tiny", "--cases", "in 2 GB"])
    assert command.main() == 0
    assert "nothing is written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert sorted((ROOT / "benchmarks" / "results").iterdir()) == before


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    assert command.main() == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_bar_that_could_not_be_measured_is_not_met():
    assert not Bar("share", None, at_least=0.9).met
    assert not Bar("share", 0.89, at_least=0.9).met
    assert Bar("share", 0.9, at_least=0.9).met
    assert not Bar("formula", 1.06, 0.95, 1.05).met
    assert not Bar("formula", 0.94, 0.95, 1.05).met


def test_a_way_that_fails_does_not_stop_the_others():
    def fails():
        raise RuntimeError("a kernel\nthat failed")

    stopwatch = Stopwatch(command.torch.device("cpu"), rounds=4, seconds=60)
    samples, failed = stopwatch.interleaved([Way("bad", lambda _: fails), Way("good", lambda _: list)], sets=1)
    assert failed == {"bad": "RuntimeError: a kernel"}
    assert len(samples["good"].ms) == 4


def test_every_set_of_inputs_gets_its_turn():
    seen = []
    way = Way("a", lambda number: lambda: seen.append(number))
    Stopwatch(command.torch.device("cpu"), rounds=5, seconds=60).interleaved([way], sets=2)
    assert seen == [0, 1, 0, 1, 0]


def test_parts_count_as_often_as_they_are_needed():
    way = Way("copy", lambda _: list)
    assert total_ms([Part(way, 2.5), Part(way, 0.5)], {"copy": 4.0}) == 12.0


def test_the_documented_memory():
    """By hand: 2 models of 4 bytes and a gradient of 2, for as many columns or rows as fit."""
    shape = SHAPES[0]
    gradients = 2 * 8192 * 4096 + 2 * 128256 * 4096 + 40 * 8192
    assert memory_formula_bytes(shape, 2 * 10**9) == 10 * 8192 * 24320 + 4 * 8192 * 4096 + gradients
    assert ppo_formula_bytes(shape, 2 * 10**9) == 4 * 8192 * 4096 + 4 * 128256 * 4096 + 10 * 1552 * 128256
    small = Shape(64, 32, 500)
    assert memory_formula_bytes(small, 10**9) == 10 * 64 * 500 + 4 * 64 * 32 + 2 * 64 * 32 + 2 * 500 * 32 + 40 * 64


def test_a_shape_is_judged_by_its_sizes_alone():
    assert Shape.parse("8192x4096x128256").judged
    assert not Shape.parse("100x32x500").judged


def test_the_folder_of_peers_is_ignored():
    path = Path("benchmarks/gpu/.peers/verl_kernel/kernels.py")
    assert subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT, timeout=20).returncode == 0
