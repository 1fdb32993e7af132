"""The benchmarks: every case runs and is right, and the figures are what they claim to be."""

import json
import math
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory, optional, run, scaling, table
from benchmarks.accuracy import ulp_error
from benchmarks.cases import select
from benchmarks.measure import LIMIT, judge, measure
from benchmarks.timing import MINIMUM_ROUNDS, SLOW, CudaColdClock, percentile, summarize, take_turns
from benchmarks.work import OURS, Case, Contender, Goal, Setup, Work, powers
from tests.bench_rows import contender, example_row

BUDGET = 0.002
ALL_SMOKE = {case.title: case for case in select(smoke=True)}
SMOKE = {title: case for title, case in ALL_SMOKE.items() if case.device in (None, "cpu")}


@pytest.mark.parametrize("title", SMOKE)
def test_case_runs_and_is_right(title):
    row = measure(SMOKE[title], Setup(), BUDGET)
    assert [c["name"] for c in row["contenders"] if not c["correct"]] == []
    assert all(0 < c["p20"] <= c["median"] <= c["p80"] for c in row["contenders"])
    assert row["best"] in [c["name"] for c in row["contenders"][1:]]
    json.dumps(row, allow_nan=False)
    assert max(map(len, table.terminal(row).splitlines())) <= 120


@pytest.mark.parametrize("title", [t for t in ALL_SMOKE if t.startswith(("fuse.", "linear.", "norm.", "step.train_n"))])
def test_operations_are_those_of_torchs_products(title, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)  # a peer of the narrow steps
    work = ALL_SMOKE[title].build(Setup(ALL_SMOKE[title].dtype or torch.float32))
    with FlopCounterMode(display=False) as counter:
        work.contenders["torch"].run()
    assert work.flops in (0, counter.get_total_flops())


@pytest.mark.cuda
@pytest.mark.parametrize("title", ALL_SMOKE)
def test_case_runs_on_cuda(title):
    case = ALL_SMOKE[title]
    assert measure(case, Setup(case.dtype or torch.float32, "cuda"), BUDGET)["contenders"][0]["correct"]


@pytest.mark.cuda
def test_what_the_host_takes_is_not_timed_on_cuda():
    x = torch.zeros(8, device="cuda")

    def run():
        time.sleep(0.003)
        x.add_(1)

    assert CudaColdClock()(run, 3) / 3 < 1e-3


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


def test_slow_calls_are_timed_twice():
    calls = []
    seconds = {"fast": 1e-3, "slow": SLOW + 1}
    runs = {name: (lambda name=name: calls.append(name) or name) for name in seconds}
    timings = take_turns(runs, 1e-2, lambda run, count: count * seconds[run()])
    assert calls.count("slow") == 3  # and one untimed
    assert timings["slow"].samples == 2 and timings["slow"].median == SLOW + 1
    assert timings["fast"].samples >= MINIMUM_ROUNDS
    assert take_turns({"slow": runs["slow"]}, 1e-2, lambda *_: SLOW + 1)["slow"].samples == 2


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


def test_a_case_of_one_dtype_is_measured_once():
    cases = [case for case in select("linear.gelu 1024") if case.size == "1024x1024x4096"]
    dtypes = [run.dtypes(case, cases, ["float32", "bfloat16"]) for case in cases]
    assert dtypes == [[torch.float32], [torch.bfloat16]]


def made_up(build):
    return measure(Case("made", "up", "4", build), Setup(optional=frozenset(optional.PEERS)), BUDGET)


def test_memory_is_what_is_kept_and_what_a_repetition_adds():
    kept = torch.ones(2**22)  # shared, so nobody's

    def make(megabytes):
        states = torch.ones(megabytes * 2**18)
        return Contender(lambda: (kept + 1, states), lambda: [torch.ones(4)])

    def build(_):
        return Work({OURS: make(8), "torch": make(24)}, lambda: [torch.ones(4).double()], tolerance=1)

    needed = [c["memory"] for c in made_up(build)["contenders"]]
    if memory.meter("cpu"):
        assert [count / 2**20 for count in needed] == pytest.approx([24, 40], abs=4)
    else:  # the system does not tell
        assert needed == [None, None]


def test_optional_peers_that_are_not_there_or_fail_are_named(monkeypatch):
    monkeypatch.setitem(optional.PEERS, "torchao", optional.Package("no_such_module.optim", "torchao"))
    monkeypatch.setitem(optional.PEERS, "deepspeed", optional.Package("json", "deepspeed", "cuda"))
    for peer in ("bitsandbytes", "jax", "liger"):
        monkeypatch.setitem(optional.PEERS, peer, optional.Package("json", peer))
    right = Contender(lambda: None, lambda: [torch.ones(4)])

    def fails():
        raise RuntimeError("no compiler\nmore")

    def build(setup):
        contenders = {OURS: right}
        for peer in ("torchao", "deepspeed", "liger"):
            setup.add(contenders, peer, lambda module: right)
        setup.add(contenders, "bitsandbytes", lambda module: module.Missing)
        setup.add(contenders, "jax", lambda module: Contender(fails, fails))
        return Work(contenders, lambda: [torch.ones(4).double()], tolerance=1)

    row = made_up(build)
    assert [c["name"] for c in row["contenders"]] == [OURS, "liger"]
    assert row["absent"] == {
        "torchao": "pip install torchao",
        "deepspeed": "runs on cuda only",
        "bitsandbytes": "AttributeError: module 'json' has no attribute 'Missing'",
        "jax": "RuntimeError: no compiler",
    }
    assert "torchao in 2 rows: pip install torchao" in table.absent([row, row])
    # Nobody asked for any of them.
    assert measure(Case("made", "up", "4", build), Setup(), BUDGET)["absent"] == {}


def test_peers_of_optimizers_take_the_options_of_the_rule(monkeypatch):
    """With torch's own in the place of another package's."""
    monkeypatch.setitem(optional.PEERS, "bitsandbytes", optional.Package("torch.optim", "bitsandbytes"))
    for title in ("optim.adamw 3 x 17", "optim.sgd_momentum 3 x 17"):
        row = measure(SMOKE[title], Setup(optional=frozenset(["bitsandbytes"])), BUDGET)
        assert [c["correct"] for c in row["contenders"] if c["name"] == "bitsandbytes"] == [True]


def test_liger_takes_part_where_labels_are_numbers(monkeypatch):
    """With torch's own in its place, which runs here."""
    ours = types.SimpleNamespace(
        LigerCrossEntropyLoss=torch.nn.CrossEntropyLoss,
        LigerFusedLinearCrossEntropyLoss=lambda: lambda weight, x, labels: F.cross_entropy(x @ weight.t(), labels),
    )
    monkeypatch.setitem(sys.modules, "liger", ours)
    monkeypatch.setitem(optional.PEERS, "liger", optional.Package("liger", "liger-kernel"))
    for title in ("loss.cross_entropy 3x10", "linear_cross_entropy.labels 5x3x7", "loss.mse 1 K"):
        row = measure(SMOKE[title], Setup(optional=frozenset(["liger"])), BUDGET)
        taking_part = [c["correct"] for c in row["contenders"] if c["name"] == "liger"]
        assert taking_part == [True] * ("mse" not in title), title


def test_series_grow():
    assert powers(1, 100, 4) == [1, 4, 16, 64]
    titles = [series.title for series in scaling.select()]
    assert len(titles) == len(set(titles))
    assert {series.of for series in scaling.select()} == {"params", "tensors", "batch", "classes", "threads"}
    for series in [*scaling.select(), *scaling.select(smoke=True)]:
        assert list(series.sizes) == sorted(set(series.sizes))
        assert len({series.case(size).title for size in series.sizes}) == len(series.sizes)
