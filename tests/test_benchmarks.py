"""The benchmarks: every case runs and is right, and the figures are what they claim to be."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import environment, heaps, report, run, table
from benchmarks.accuracy import ulp_error
from benchmarks.cases import select
from benchmarks.measure import LIMIT, compare, judge, measure
from benchmarks.timing import MINIMUM_ROUNDS, percentile, summarize, take_turns
from benchmarks.work import OURS, Case, Contender, Goal, Setup, Work

BUDGET = 0.002
SMOKE = {case.title: case for case in select(smoke=True)}


def contender(name, median, correct=True):
    return {
        "name": name,
        "median": median,
        "p20": median,
        "p80": median,
        "samples": 5,
        "ulp": 0.5 if correct else None,
        "correct": correct,
        "noisy": False,
    }


def example_row(*contenders, **changes):
    contenders = contenders or (contender(OURS, 2e-3), contender("torch", 5e-3))
    row = {
        "family": "loss",
        "case": "mse",
        "size": "16 M",
        "dtype": "float32",
        "device": "cpu",
        "contenders": list(contenders),
        "limit": {"what": "copy, 12 B an element", "seconds": 1e-3},
        "bytes": 2**20,
        "flops": 0,
        "goal": None,
    }
    return {**row, **compare(row["contenders"]), **changes}


@pytest.mark.parametrize("title", SMOKE)
def test_case_runs_and_is_right(title):
    row = measure(SMOKE[title], Setup(), BUDGET)
    assert [c["name"] for c in row["contenders"] if not c["correct"]] == []
    assert all(0 < c["p20"] <= c["median"] <= c["p80"] for c in row["contenders"])
    assert row["best"] in [c["name"] for c in row["contenders"][1:]]
    json.dumps(row, allow_nan=False)
    assert max(map(len, table.terminal(row).splitlines())) <= 120


@pytest.mark.cuda
@pytest.mark.parametrize("title", SMOKE)
def test_case_runs_on_cuda(title):
    assert measure(SMOKE[title], Setup(device="cuda"), BUDGET)["contenders"][0]["correct"]


@pytest.mark.parametrize("title", [t for t in SMOKE if "256 K" not in t])
def test_ours_is_right_in_bfloat16(title):
    assert measure(SMOKE[title], Setup(torch.bfloat16), BUDGET)["contenders"][0]["correct"]


def test_full_and_smoke_runs_have_the_same_cases():
    names = [{(case.family, case.name) for case in select(smoke=smoke)} for smoke in (True, False)]
    assert names[0] == names[1]


def test_selection_by_title():
    assert {case.family for case in select("optim.")} == {"optim"}
    assert [case.title for case in select("optim.adamw 67 M")] == ["optim.adamw 67 M"]
    assert select("nothing of that name") == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("title", [t for t in SMOKE if t.startswith("optim.") and "3 x 17" in t])
def test_a_step_that_does_nothing_is_wrong(title, dtype):
    work = SMOKE[title].build(Setup(dtype))
    start = Setup(dtype).away_from_zero(17)  # the first numbers that the case draws
    assert ulp_error(start, work.reference()[0]) > work.tolerance


def test_a_wrong_peer_is_marked_and_never_the_best():
    exact = torch.ones(4, dtype=torch.float64)

    def build(_):
        contenders = {
            OURS: Contender(lambda: sum(range(2000)), lambda: [torch.ones(4)]),
            "slow": Contender(lambda: sum(range(20000)), lambda: [torch.ones(4)]),
            "idle": Contender(lambda: None, lambda: [torch.zeros(4)]),
            "mute": Contender(lambda: None, list),
        }
        return Work(contenders, lambda: [exact], tolerance=4)

    row = measure(Case("made", "up", "4", build, Goal(ratio=1.5, peer="idle")), Setup(), BUDGET)
    assert row["best"] == "slow"
    assert [c["correct"] for c in row["contenders"]] == [True, True, False, False]
    assert row["goal"]["met"]
    assert any("idle" in note and "WRONG" in note for note in table.notes(row))


def test_without_a_correct_peer_there_is_no_ratio():
    row = example_row(contender(OURS, 2e-3), contender("torch", 1e-3, correct=False))
    assert row["ratio"] is None and row["best"] is None
    assert "none correct" in table.terminal(row)


def test_goals():
    row = example_row()  # 2.5 times the peer's speed, 50 % of the limit
    assert judge(Goal(2.5), row, "default")["met"]
    assert not judge(Goal(2.6), row, "default")["met"]
    assert judge(Goal(4.0, kept=2.0), row, "kept")["met"]
    assert not judge(Goal(4.0, kept=2.0), row, "default")["met"]
    assert judge(Goal(limit=0.5), row, "default")["met"]
    assert judge(Goal(2.0, limit=0.6), row, "default") == {
        "text": "2x 60%",
        "ratio": 2.0,
        "peer": "torch",
        "limit": 0.6,
        "met": False,
    }
    wrong = example_row(contender(OURS, 1e-3, correct=False), contender("torch", 5e-3))
    assert not judge(Goal(2.0), wrong, "default")["met"]


def test_percentiles():
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.5
    assert percentile([7.0], 0.8) == 7.0
    timing = summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert timing == (3.5, 2.0, 5.0, 6)
    assert timing.noisy
    assert not summarize([1.0, 1.1, 1.2]).noisy
    with pytest.raises(ValueError, match="samples is empty"):
        summarize([])


def test_everyone_gets_the_same_number_of_turns_and_the_first_one_now_and_then():
    turns = []

    def clock(run, calls):
        run()
        return 1.0

    runs = {name: (lambda name=name: turns.append(name)) for name in "abc"}
    timings = take_turns(runs, 1e-9, clock)
    assert {t.samples for t in timings.values()} == {MINIMUM_ROUNDS}
    rounds = turns[-3 * MINIMUM_ROUNDS :]
    rounds = ["".join(rounds[i : i + 3]) for i in range(0, len(rounds), 3)]
    assert rounds == ["abc", "bca", "cab", "abc", "bca"]


def test_fast_calls_are_timed_in_bulk():
    counts = []

    def clock(_, calls):
        counts.append(calls)
        return calls * 1e-6

    take_turns({"fast": lambda: None}, 1.0, clock)
    assert counts[-1] in (1000, 1001)  # a millisecond


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ulp_error_counts_steps_between_neighbours(dtype):
    value = torch.tensor([1.0, 1.5, 3.0, -0.75, 100.0], dtype=dtype)
    far = torch.full_like(value, math.inf)
    assert ulp_error(value, value.double()) == 0.0
    assert ulp_error(torch.nextafter(value, far), value.double()) == 1.0


def test_ulp_error_of_what_has_no_distance():
    nan, inf = math.nan, math.inf
    assert ulp_error(torch.tensor([nan, inf, -inf, 0.0]), torch.tensor([nan, inf, -inf, 0.0]).double()) == 0.0
    assert ulp_error(torch.tensor([nan]), torch.tensor([1.0]).double()) == inf
    assert ulp_error(torch.tensor([inf]), torch.tensor([1.0]).double()) == inf
    assert ulp_error(torch.ones(2), torch.ones(3).double()) == inf
    assert ulp_error(torch.ones(0), torch.ones(0).double()) == 0.0


def test_ulp_error_with_a_floor():
    exact = torch.tensor([1.0, 0.0], dtype=torch.float64)
    result = torch.tensor([1.0, 2**-23])
    assert ulp_error(result, exact) > 1e6
    assert ulp_error(result, exact, "rms") == 2.0  # rms is 0.71, whose neighbours are 2**-24 apart


def test_limit_scales_to_the_traffic():
    traffic = 3 * 2**20
    limit = Setup().copy_limit(traffic, "3 B an element")
    assert limit.what == "copy, 3 B an element"
    assert limit.scale == pytest.approx(1.0)
    assert Setup().copy_limit(1000, "3 B an element") is None
    row = measure(SMOKE["linear.relu 3x5x7"], Setup(), BUDGET)
    assert row["limit"]["what"] == "the 3 GEMMs" and LIMIT not in [c["name"] for c in row["contenders"]]


def test_run_writes_json_that_report_reads(tmp_path, capsys):
    file = tmp_path / "results" / "cpu.json"
    arguments = ["-k", "mse", "--size", "smoke", "--budget", str(BUDGET), "--dtype", "float32,float64"]
    assert run.main([*arguments, "--json", str(file)]) == 0
    assert "best peer" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert [row["dtype"] for row in written["rows"]] == ["float32", "float64"]
    assert {"cpu", "threads", "heap", "torch", "gdbp", "commit", "date"} <= written["environment"].keys()
    assert report.main([str(file)]) == 0
    assert "| loss.mse | 1 K | f32 |" in capsys.readouterr().out


def test_report_keeps_a_document_up_to_date(tmp_path, capsys):
    file, document = tmp_path / "cpu.json", tmp_path / "README.md"
    file.write_text(json.dumps({"environment": environment.describe("cpu"), "rows": [example_row()]}))
    document.write_text("before\n<!-- benchmarks:cpu -->\nold\n<!-- /benchmarks:cpu -->\nafter\n")
    arguments = ["--update", str(document), str(file)]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in document.read_text()
    assert report.main(arguments) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- benchmarks:cpu -->\n") and text.endswith("-->\nafter\n")
    assert "2.00 ms" in text and "old" not in text
    assert report.main([*arguments, "--check"]) == 0
    document.write_text("no markers")
    capsys.readouterr()
    assert report.main(arguments) == 2
    assert "<!-- benchmarks:cpu -->" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "", "[]", '{"environment": {}}'])
def test_report_refuses_what_is_no_result(tmp_path, capsys, text):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    assert report.main([str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_a_case_of_one_dtype_is_measured_once():
    cases = [case for case in select("linear.gelu 1024") if case.size == "1024x1024x4096"]
    dtypes = [run._dtypes(case, cases, ["float32", "bfloat16"]) for case in cases]
    assert dtypes == [[torch.float32], [torch.bfloat16]]


def test_refusals_of_run(capsys):
    assert run.main(["-k", "nothing of that name"]) == 2
    assert "--list" in capsys.readouterr().err
    for arguments in (["--dtype", "int8"], ["--budget", "0"], ["--threads", "-1"]):
        with pytest.raises(SystemExit) as stop:
            run.main(arguments)
        assert stop.value.code == 2


def test_list_shows_cases_and_goals(capsys):
    assert run.main(["--list", "-k", "optim.adamw"]) == 0
    assert "40.00x of torch fused" in capsys.readouterr().out


def test_kept_heap_is_measured_in_a_process_that_keeps_it(tmp_path):
    file = tmp_path / "kept.json"
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    arguments = [
        "--heap",
        "kept",
        "-k",
        "mse",
        "--size",
        "smoke",
        "--budget",
        str(BUDGET),
        "--json",
        str(file),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.run", *arguments],
        cwd=environment.ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "child process" in done.stdout
    assert json.loads(file.read_text())["environment"]["heap"] == "kept"


def test_heaps_are_measured_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heaps, "heaps", lambda: {name: heaps.HEAPS[name] for name in (heaps.COLD, "gdbp")})
    file = tmp_path / "heaps" / "cpu.json"
    assert heaps.main(["--smoke", "--rounds", "1", "-k", "empty 64 B", "--json", str(file)]) == 0
    assert "| empty 64 B |" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["heaps"].keys() == {heaps.COLD, "gdbp"}
    assert all(of["ms"] > 0 and of["faults"] > 0 for of in row["heaps"].values())
    assert heaps.main(["-k", "nothing of that name"]) == 2
    assert "training" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="ended with status 3"):
        heaps.measure(["-c", "raise SystemExit(3)"], {}, 1)
