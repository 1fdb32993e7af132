"""What ``python -m gdbp bench`` makes of results: comparisons, Markdown, pictures and the HTML page."""

import json
import re
import sys
from html.parser import HTMLParser

import pytest

from benchmarks import compare, environment, figures, files, html, report
from benchmarks.work import OURS
from tests.bench_rows import bench, contender, example_report, example_row

DOCUMENTS = [environment.ROOT / "README.md", environment.ROOT / "benchmarks" / "results" / "README.md"]


@pytest.fixture
def save(tmp_path):
    """Writes a report and returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(environment.ROOT)))
def test_documents_hold_what_is_measured(document):
    """Whoever commits results also runs: python -m gdbp bench report --update, for each of them."""
    assert bench("report", "--update", document, "--check") == 0


def test_a_document_may_show_some_rows(save):
    rows = [example_row(case=case) for case in ("first", "second", "third")]
    file = save("cpu.json", example_report(*rows))
    document = save("README.md", "<!-- benchmarks:cpu first loss.th -->\n<!-- /benchmarks:cpu first loss.th -->\n")
    assert bench("report", "--update", document, file) == 0
    text = document.read_text()
    assert "loss.first" in text and "loss.third" in text and "loss.second" not in text


def test_a_document_may_show_one_heap(save):
    made = [example_report(example_row(case=f"of_{heap}")) for heap in ("default", "kept")]
    made[1]["environment"]["heap"] = "kept"
    paths = [save(f"{i}.json", content) for i, content in enumerate(made)]
    document = save("README.md", "<!-- benchmarks:cpu loss. heap:kept -->\n<!-- /benchmarks:cpu loss. heap:kept -->\n")
    assert bench("report", "--update", document, *paths) == 0
    text = document.read_text()
    assert "loss.of_kept" in text and "loss.of_default" not in text


@pytest.mark.parametrize("noisy", [False, True])
def test_a_document_may_be_short(save, noisy):
    """Fewer columns; but what is noise is said."""
    content = example_report()
    content["rows"][0]["contenders"][0]["noisy"] = noisy
    document = save("README.md", "<!-- benchmarks:cpu short -->\n<!-- /benchmarks:cpu short -->\n")
    assert bench("report", "--update", document, save("cpu.json", content)) == 0
    text = document.read_text()
    assert "p20-p80" not in text and " ulp" not in text and "2.00 ms" in text
    assert ("| NOISY: gdbp |" in text) == ("notes" in text) == noisy
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1


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


DAMAGED = {
    "no end": "{start}text\n{start}{end}",
    "another's end": "{start}text\n<!-- /benchmarks:cuda -->\n{start}{end}",
    "no end, of other words": "<!-- benchmarks:cpu loss. -->\ntext\n{start}{end}",
    "no start": "{start}{end}text\n{end}",
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_document_stays_as_it_is(damaged, save, capsys):
    file = save("cpu.json", example_report())
    text = damaged.format(start="<!-- benchmarks:cpu -->\n", end="<!-- /benchmarks:cpu -->\n")
    document = save("README.md", text)
    for check in ([], ["--check"]):
        assert bench("report", "--update", document, file, *check) == 2
        error = capsys.readouterr().err
        assert "are damaged at benchmarks:cpu" in error and error.count("\n") == 1
    assert document.read_text() == text


def test_a_document_that_is_no_text(save, tmp_path, capsys):
    document = tmp_path / "README.md"
    document.write_bytes(b"<!-- benchmarks:cpu -->\n\xff<!-- /benchmarks:cpu -->\n")
    assert bench("report", "--update", document, save("cpu.json", example_report())) == 2
    assert "README.md is no text in UTF-8 (invalid start byte at byte 24)" in capsys.readouterr().err


def test_document_shows_the_newest_gpu_or_that_there_is_none(save, tmp_path, monkeypatch):
    empty = "".join(f"<!-- benchmarks:{device} -->\n<!-- /benchmarks:{device} -->\n" for device in report.DEVICES)
    document = save("README.md", empty)
    monkeypatch.setattr(files, "committed", lambda folder=tmp_path / "results", real=files.committed: real(folder))
    save("results/accuracy/x.json", {"environment": {"cpu": "any"}, "rows": []})  # something else
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


def test_document_shows_the_newest_of_each_heap(save):
    words = "benchmarks:cpu loss. newest"
    document = save("README.md", f"<!-- {words} -->\n<!-- /{words} -->\n")
    dates = {"a": ("default", 2), "b": ("default", 1), "c": ("kept", 1), "d": ("kept", 3)}
    runs = [
        save(f"{name}.json", example_report(example_row(case=name), heap=heap, date=f"203{year}-01-01T00:00:00+00:00"))
        for name, (heap, year) in dates.items()
    ]
    assert bench("report", "--update", document, *runs) == 0
    assert [name for name in dates if f"loss.{name} |" in document.read_text()] == ["a", "d"]


def damaged_reports():
    for rows in (
        "none",
        {"a": 1},
        [None],
        [{"goal": None}],
        *([example_row() | {"contenders": c}] for c in (None, [], [{}])),
    ):
        yield json.dumps(example_report() | {"rows": rows})
    yield json.dumps(example_report() | {"environment": {"device": "cpu"}})


@pytest.mark.parametrize("text", [None, "", "[]", '{"environment": {}}', *damaged_reports()])
def test_what_is_no_result_is_refused(tmp_path, capsys, text):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    for command in (["report", file], ["compare", file, file], ["plot", file, "--out", tmp_path / "out"]):
        assert bench(*command) == 2
        error = capsys.readouterr().err
        assert str(file) in error and error.count("\n") == 1


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
    save("out/earlier-growth.png", "a picture of an earlier page")
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


def test_the_median_of_an_even_number_is_between_two():
    rows = [timed(1e-3, peer=peer) for peer in (0.5e-3, 10e-3)]
    assert "<b>5.25x</b><span>median ratio" in html.page([(example_report(*rows), [])])


def test_a_row_stands_under_the_limit_that_it_has():
    copied = example_row(limit={"what": "copy, 4 B a row", "seconds": 1e-3}, bytes=2**20, flops=2**30)
    product = example_row(limit={"what": "GEMMs", "seconds": 1e-3}, bytes=2**20, flops=2**30)
    for row, label in ((copied, "bytes to move"), (product, "operations to do")):
        (axis,) = figures.roofline(example_report(row)).axes
        assert axis.get_xlabel() == label


def test_pictures_of_committed_results_are_named_after_their_files(save, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "committed", lambda real=files.committed: real(tmp_path / "results"))
    save("results/cpu/xeon-kept.json", example_report(example_row(limit=None)))
    save("results/h200/2030.json", example_report(example_row(limit=None), gpu="NVIDIA H200"))
    assert bench("plot", "--out", tmp_path / "out") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "cpu-xeon-kept-ratios.png", "h200-2030-ratios.png"}


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
