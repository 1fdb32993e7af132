"""``python -m gdbp bench``: its commands, on tiny cases and on made-up results."""

import csv
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import environment, files, run, scaling
from benchmarks.work import OURS
from gdbp import _bench
from tests.bench_rows import COMMIT, bench, example_report

SMOKE = ("--size", "smoke", "--budget", "0.002")


def test_run_writes_json_and_csv_that_report_reads(tmp_path, capsys):
    file, table = tmp_path / "results" / "cpu.json", tmp_path / "tables" / "cpu.csv"
    assert bench("run", "-k", "loss.mse", *SMOKE, "--dtype", "f32,float64,f32", "--json", file, "--csv", table) == 0
    printed = capsys.readouterr().out
    assert "best peer" in printed and "2 rows: " in printed
    written = json.loads(file.read_text())
    assert [row["dtype"] for row in written["rows"]] == ["float32", "float64"]
    assert {"cpu", "threads", "heap", "torch", "gdbp", "peers", "commit", "date"} <= written["environment"].keys()
    lines = list(csv.DictReader(table.open()))
    assert [line["contender"] for line in lines] == [OURS, "torch"] * 2
    assert float(lines[0]["gdbp_ratio"]) == 1
    assert float(lines[1]["median_s"]) == written["rows"][0]["contenders"][1]["median"]
    assert bench("report", file) == 0
    assert "| loss.mse | 1 K | f32 |" in capsys.readouterr().out


def test_run_saves_under_the_machine(tmp_path, monkeypatch, capsys):
    folder = environment.ROOT / "benchmarks" / "results"
    assert files.place(example_report()) == folder / "cpu" / "2030-01-02-0123456789ab.json"
    gpu = example_report(gpu="NVIDIA H100 80GB HBM3", commit=COMMIT + "+")
    assert files.place(gpu) == folder / "nvidia-h100-80gb-hbm3" / "2030-01-02-0123456789ab-changed.json"
    assert files.place(example_report(heap="kept")).name == "2030-01-02-0123456789ab-kept.json"
    monkeypatch.setattr(files, "place", lambda report: tmp_path / "cpu" / "x.json")
    assert bench("run", "-k", "loss.huber", *SMOKE, "--save") == 0
    assert files.load(tmp_path / "cpu" / "x.json")["rows"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_leave_what_they_measured(number, tmp_path, monkeypatch, capsys):
    """As `timeout` ends them, too."""
    file, place = tmp_path / "part.json", tmp_path / "results" / "x.json"
    monkeypatch.setattr(files, "place", lambda report: place)
    measure = run.measure

    def second_ends(case, *args):
        if "huber" in case.title:
            os.kill(os.getpid(), number)
        return measure(case, *args)

    monkeypatch.setattr(run, "measure", second_ends)
    before = signal.getsignal(signal.SIGTERM)
    assert bench("run", "-k", "loss.", *SMOKE, "--json", file, "--save") == run.INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before
    assert "interrupted after 4 rows" in capsys.readouterr().err
    written = files.load(file)
    assert written["interrupted"] and written["rows"][-1]["case"] == "mse" and not place.exists()
    assert bench("report", file) == 0


def test_commit_of_a_copy(monkeypatch):
    monkeypatch.setenv("GDBP_COMMIT", COMMIT)
    assert environment.git_commit() == COMMIT
    monkeypatch.delenv("GDBP_COMMIT")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert environment.git_commit() is None


def test_absent_peers_are_said_once(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert bench("run", "-k", "optim.lion", *SMOKE, "--peers", "bitsandbytes") == 0
    assert capsys.readouterr().out.count("bitsandbytes in 2 rows: pip install bitsandbytes") == 1


def test_list_shows_cases_and_goals(capsys):
    assert bench("list", "-k", "optim.adamw") == 0
    assert "40.00x of torch fused" in capsys.readouterr().out


def test_env(capsys):
    assert bench("env") == 0
    assert torch.__version__ in capsys.readouterr().out
    assert bench("env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["run", "-k", "nothing of that name"], "no case has 'nothing of that name'"),
        (["run", "-k", "step.infer"], "the cases with 'step.infer' in their titles do not run on cpu"),
        (["run", "--dtype", "int8"], "'int8'; expected some of float32"),
        (["run", "--budget", "0"], "got '0'; expected a finite number above 0"),
        (["run", "--threads", "-1"], "got '-1'; expected a whole number of at least 1"),
        (["run", "--peers", "numpy"], "'numpy'; expected some of eager"),
        (["scaling", "-k", "nothing"], "no series has 'nothing' in its title; there are linear.relu by batch"),
        (["compare", "a.json", "b.json", "--fail", "much"], "'much'; expected a percentage"),
        (["compare", "no.json", "no.json"], "no.json cannot be read"),
        (["report", "--check"], "--check compares with a document"),
        (["plot", "a/x.json", "b/x.json"], "cannot be read"),
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_refusals_are_one_sentence(arguments, words, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("gdbp: ") and words in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["--json", "--csv"])
@pytest.mark.parametrize("name", ["/proc/x.csv", "file/x.csv", "a\0.csv"])
def test_files_are_tried_before_anything_is_measured(option, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert bench("run", "-k", "loss.mse", *SMOKE, option, name) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and f"{name} can't be written to (" in captured.err


def test_help_is_that_of_the_benchmarks(capsys):
    with pytest.raises(SystemExit) as stop:
        bench("--help")
    assert stop.value.code == 0
    assert "scaling" in capsys.readouterr().out


def test_an_installation_says_where_the_benchmarks_are(tmp_path, monkeypatch, capsys):
    (tmp_path / "benchmarks").mkdir()  # somebody else's
    monkeypatch.setattr(_bench, "ROOT", tmp_path)
    assert bench("run", "--anything", "at all") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "source checkout" in error


def test_kept_heap_is_measured_in_a_process_that_keeps_it(tmp_path):
    file = tmp_path / "kept.json"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    arguments = ["run", "--heap", "kept", "-k", "loss.mse", *SMOKE, "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "gdbp", "bench", *arguments],
        cwd=environment.ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "child process" in done.stdout
    assert json.loads(file.read_text())["environment"]["heap"] == "kept"


def test_exponents():
    sizes = [10, 100, 1000, 10000]
    assert scaling.fit(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx((1.5, 0), abs=1e-9)
    slope, error = scaling.fit([1, 2, 4], [1, 2.2, 4])
    assert slope == pytest.approx(1) and 0 < error < 0.2
    assert scaling.fit([1, 2], [1, 2]) is None


@pytest.mark.parametrize("title", [series.title for series in scaling.select(smoke=True)])
def test_scaling_of_every_series(title, tmp_path, capsys):
    file = tmp_path / "scaling.json"
    assert bench("scaling", "-k", title, *SMOKE, "--json", file) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[3:])) <= 120
    found = json.loads(file.read_text())
    assert found["series"][0]["contender"] == OURS
    assert ("^(" in printed) == (found["series"][0]["exponent"] is not None)
    assert all(row["contenders"][0]["correct"] for row in found["rows"])
    assert torch.get_num_threads() == 2
