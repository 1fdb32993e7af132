"""``python -m gdbp bench``: its commands, on tiny cases and on made-up results."""

import csv
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from benchmarks import compare, environment, figures, files, html, report, scaling
from benchmarks.cases import select_series
from benchmarks.work import OURS
from gdbp import _bench
from gdbp.__main__ import main
from tests.bench_rows import COMMIT, contender, example_report, example_row

SMOKE = ("--size", "smoke", "--budget", "0.002")
README = environment.ROOT / "README.md"


def bench(*arguments) -> int:
    return main(["bench", *map(str, arguments)])


@pytest.fixture
def save(tmp_path):
    """Writes a report and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


def test_run_writes_json_and_csv_that_report_reads(tmp_path, capsys):
    file, table = tmp_path / "results" / "cpu.json", tmp_path / "tables" / "cpu.csv"
    assert bench("run", "-k", "mse", *SMOKE, "--dtype", "f32,float64", "--json", file, "--csv", table) == 0
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
    monkeypatch.setattr(files, "place", lambda report: tmp_path / "cpu" / "x.json")
    assert bench("run", "-k", "huber", *SMOKE, "--save") == 0
    assert files.load(tmp_path / "cpu" / "x.json")["rows"]


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
        (["run", "--dtype", "int8"], "'int8'; expected some of float32"),
        (["run", "--budget", "0"], "expected a number > 0"),
        (["run", "--threads", "-1"], "expected a number > 0"),
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
    command = [sys.executable, "-m", "gdbp", "bench", "run", "--heap", "kept", "-k", "mse", *SMOKE, "--json", str(file)]
    done = subprocess.run(
        command, cwd=environment.ROOT, env=variables, capture_output=True, text=True, check=True
    )  # fmt: skip
    assert "child process" in done.stdout
    assert json.loads(file.read_text())["environment"]["heap"] == "kept"


def test_readme_holds_what_is_measured():
    """Whoever commits results also runs: python -m gdbp bench report --update README.md"""
    assert bench("report", "--update", README, "--check") == 0


def test_report_keeps_a_document_up_to_date(save, capsys):
    file = save("cpu.json", example_report())
    document = save("README.md", "before\n<!-- benchmarks:cpu -->\nold\n<!-- /benchmarks:cpu -->\nafter\n")
    assert bench("report", "--update", document, file, "--check") == 1
    assert "old" in document.read_text()
    assert bench("report", "--update", document, file) == 0
    text = document.read_text()
    assert text.startswith("before\n<!-- benchmarks:cpu -->\n") and text.endswith("-->\nafter\n")
    assert "2.00 ms" in text and "old" not in text
    assert bench("report", "--update", document, file, "--check") == 0
    document.write_text("no markers")
    capsys.readouterr()
    assert bench("report", "--update", document, file) == 2
    assert "<!-- benchmarks:cpu -->" in capsys.readouterr().err


def test_document_shows_the_newest_gpu_or_that_there_is_none(save, tmp_path, monkeypatch):
    empty = "".join("{}\n{}\n".format(*report.markers(device)) for device in report.DEVICES)
    document = save("README.md", empty)
    monkeypatch.setattr(files, "committed", lambda folder=tmp_path / "results", real=files.committed: real(folder))
    save("results/cpu/b.json", example_report(example_row(case="second")))
    save("results/cpu/a.json", example_report(example_row(case="first")))
    assert bench("report", "--update", document) == 0
    text = document.read_text()
    assert text.index("loss.first") < text.index("loss.second")
    assert "Not measured on a GPU" in text
    for name, date, commit in (("NVIDIA A100", "2031-01-01", "a" * 40), ("NVIDIA H100", "2032-01-01", "b" * 40)):
        made = example_report(gpu=name, date=f"{date}T00:00:00+00:00", commit=commit)
        save(f"results/{files.machine(made['environment'])}/x.json", made)
    assert bench("report", "--update", document, "--check") == 1
    assert bench("report", "--update", document) == 0
    text = document.read_text()
    assert "NVIDIA H100, CUDA 13.0" in text and "gdbp 0.1.0 at bbbbbbbbbbbb" in text
    assert "A100" not in text and "Not measured" not in text


@pytest.mark.parametrize("text", [None, "", "[]", '{"environment": {}}'])
def test_what_is_no_result_is_refused(tmp_path, capsys, text):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    assert bench("report", file) == 2
    assert str(file) in capsys.readouterr().err


def timed(median, p20=None, p80=None, peer=5e-3, **changes):
    ours = contender(OURS, median) | {"p20": p20 or median, "p80": p80 or median}
    return example_row(ours, contender("torch", peer), **changes)


@pytest.mark.parametrize(
    "new, status, verdict",
    [
        (timed(2e-3), 0, ""),
        (timed(2.1e-3), 0, ""),
        (timed(2.3e-3), 1, "SLOWER"),
        (timed(2.3e-3, p20=1.9e-3, p80=3e-3), 0, "noise"),
        (timed(1e-3), 0, "faster"),
        (example_row(contender(OURS, 1e-3, correct=False), contender("torch", 5e-3)), 1, "WRONG RESULT"),
    ],
)
def test_compare(new, status, verdict, save, capsys):
    files = [save(name, example_report(row)) for name, row in (("old.json", timed(2e-3)), ("new.json", new))]
    assert bench("compare", *files, "--fail", "10%") == status
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss.mse 16 M f32")]
    assert line.endswith(verdict or "+0%")
    assert bench("compare", files[0], files[1], "--fail", "20") == int(verdict == "WRONG RESULT")


def test_compare_says_what_differs(save, capsys):
    old = save("old.json", example_report(timed(2e-3), example_row(case="gone")))
    rows = timed(2e-3, peer=6e-3), example_row(case="here")
    new = save("new.json", example_report(*rows, threads=64, cpu="another"))
    assert bench("compare", old, new) == 0
    printed = capsys.readouterr().out
    assert "not measured under the same conditions" in printed
    assert "threads: 2 before, 64 now" in printed and "another now" in printed
    assert "+20%" in printed  # the peer, on the new machine
    assert "loss.gone 16 M f32: only in the old file" in printed and "loss.here 16 M f32: new" in printed
    gpus = [example_report(gpu=name)["environment"] for name in ("A", "B")]
    assert compare.differences(*gpus) == ["GPU: A before, B now"]


def test_exponents():
    sizes = [10, 100, 1000, 10000]
    assert scaling.fit(sizes, [3e-6 * n**1.5 for n in sizes]) == pytest.approx((1.5, 0), abs=1e-9)
    slope, error = scaling.fit([1, 2, 4], [1, 2.2, 4])
    assert slope == pytest.approx(1) and 0 < error < 0.2
    assert scaling.fit([1, 2], [1, 2]) is None


@pytest.mark.parametrize("title", [series.title for series in select_series(smoke=True)])
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


class Page(HTMLParser):
    """Counts elements, and keeps what a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.rows = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.rows += tag == "tr"
        self.fetched += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def plotted_rows():
    goal = {"text": "4x", "ratio": 4.0, "peer": "torch", "limit": None, "met": False}
    lost = contender(OURS, 6e-3, memory=2**25), contender("torch", 5e-3, memory=2**26)
    wrong = contender(OURS, 1e-3, correct=False), contender("torch", 5e-3, correct=False)
    series = [
        timed(size * 1e-6, case=f"s {size}", scaling={"series": "loss.mse by batch", "of": "batch", "size": size})
        for size in (10, 100)
    ]
    return [
        example_row(goal=goal),
        example_row(*lost, case="lost"),
        example_row(*wrong, case="<b>&wrong", limit=None),
        example_row(bytes=0, flops=10**9, family="linear"),
        *series,
    ]


def test_plot_writes_one_page_and_pictures(save, tmp_path, capsys):
    file = save("all.json", example_report(*plotted_rows()))
    assert bench("plot", file, "--out", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "all-ratios.png", "all-roofline.png", "all-growth.png"}
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.fetched) == 3 and all(address.startswith("data:image/svg+xml;base64,") for address in page.fetched)
    assert not re.search(r"https?://|@import|url\(", text)
    assert page.rows == 6 + 2  # and the heads of two families
    assert "<b>&wrong" not in text and "&lt;b&gt;&amp;wrong" in text
    lost = text[text.index("Where we lose") :]
    assert "loss.lost 16 M f32</b>: torch takes 83% of our time" in lost
    assert "4x of torch wanted, 2.50x reached" in lost
    assert "33.6 MB / 67.1 MB" in text


def test_page_of_nothing_and_without_pictures(save, tmp_path, monkeypatch, capsys):
    empty = example_report()
    empty["rows"] = []
    assert all(make(empty) is None for _, make in figures.FIGURES.values())
    Page(html.page([(empty, [])]))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("plot", save("x.json", example_report()), "--out", tmp_path / "out") == 0
    assert "pip install matplotlib" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert "no peer is faster" in (tmp_path / "out" / "report.html").read_text()
