"""The table of errors: what is committed is what the command writes, and its figures are what they claim to be."""

import json
import math

import pytest
import torch

from benchmarks import accuracy_table
from benchmarks.accuracy_cases import entries, error
from benchmarks.accuracy_table import COLUMNS, FOLDER, is_lost, markdown


@pytest.fixture(scope="module")
def committed():
    return json.loads((FOLDER / "losses.json").read_text())


def test_the_committed_table_has_todays_shape(committed):
    assert set(committed) == {"environment", "rows"} and set(committed["environment"]) == set(accuracy_table.KEPT)
    assert all(tuple(row) == COLUMNS for row in committed["rows"])
    wanted = [(e.case, str(e.dtype).removeprefix("torch."), result) for e in entries() for result in e.results]
    assert [(row["case"], row["dtype"], row["result"]) for row in committed["rows"]] == wanted
    assert (FOLDER / "losses.md").read_text() == markdown(committed)


def test_the_committed_table_says_that_our_digits_are_kept(committed):
    assert not [row for row in committed["rows"] if is_lost(row, "gdbp")]
    assert [row for row in committed["rows"] if is_lost(row, "torch")]


def test_the_command_writes_what_it_prints(tmp_path, capsys, committed):
    assert accuracy_table.main(["--write", "--folder", str(tmp_path)]) == 0
    assert (tmp_path / "losses.md").read_text() == capsys.readouterr().out
    written = json.loads((tmp_path / "losses.json").read_text())
    assert [row["result"] for row in written["rows"]] == [row["result"] for row in committed["rows"]]


def test_errors():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert error(torch.tensor([3.0, 4.0]), exact) == 0
    assert error(torch.tensor([3.0, 4.5]), exact) == 0.1
    assert math.isnan(error(torch.tensor([math.nan, 4.0]), exact)) and error(torch.zeros(2), exact) == 1
    row = dict.fromkeys(COLUMNS, "") | {"gdbp": 1e-3, "torch": "nan", "rounding": 1e-3, "dtype": "float16"}
    assert not is_lost(row, "gdbp") and is_lost(row, "torch") and is_lost({**row, "gdbp": 0.1}, "gdbp")
