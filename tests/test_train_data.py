"""What python -m gdbp train reads: tables that it takes as they are, and the sentences for those of no use."""

import numpy as np
import pytest

from gdbp.train import InputError, load_data
from tests.test_train import sentence

pytest.importorskip("sklearn")


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("", [], "is empty"),
        ("a,b,y\n", [], "no samples"),
        ("a,b,y\n1,2,0\n1,red,1\n", [], "column 'b' of "),
        ("a,b,y\n1,2,0\n1,red,1\n", [], "is not a number in line 3: 'red'"),
        ("a,b,y\n1,2,0\n1,,1\n", [], "column 'b' of"),
        ("a,b,y\n1,2,0\n1,nan,1\n", [], "is nan in line 3"),
        ("a,b,y\n1,2,0\n1,inf,1\n", [], "is inf in line 3"),
        ("a,b,y\n1,2,0\n1,2,nan\n", [], "column 'y' of"),
        ("a,b,y\n1,2,0\n1,2\n", [], "line 3 has 2 cells; expected 3"),
        ("a,b,y\n1,2,0\n", ["--target", "z"], "target 'z' is not a column of"),
        ("a,a,y\n1,2,0\n", ["--target", "a"], "more than one column"),
        ("a,b,y\n1,2,x\n1,2,z\n", ["--task", "regression"], "column 'y' of"),
        ("y\n1\n2\n", [], "has one column only"),
        ("a b y\n1 2 0\n", [], "input columns beside the target, separated by commas, semicolons or tabs"),
        (",a,y\n" + "".join(f"{i},{i * i},{i % 2}\n" for i in range(60)), [], "no name and numbers the rows, from"),
        ("a,b,y,\n1,2,0,\n", [], "has no name; name the target column, or drop the last one"),
        ("a,y\n1,3\n2,3\n", [], "is the same in all samples"),
        ("2019,2020,y\n1,2,0\n1,2,1\n", [], "line 1 has 'y' where others have a number; if that line holds names"),
        ("a,b,y\n1,2,x\n1,2,0\n1,2,1\n", [], "line 2 has 'x' where others have a number; write it as"),
        ("a,y\n1,0\n2,1\n3,x\n4,1\n", [], "line 4 has 'x' where others have a number"),
        ("a,y\n" + "".join(f"{i},{i / 7}\n1,NA\n" for i in range(60)), [], "line 3 has 'NA' where others have"),
        ("a,y\n1,red\n2,NaN\n3,blue\n", [], "column 'y' of"),
        ("a,y\n1,red\n2,NaN\n3,blue\n", [], "is NaN in line 3; fill it in"),
        ("a,b,y\n1,2,0\n,,\n1,2,1\n", [], "column 'a' of"),
        ("a,b,y\n1,2,0\n\n,,\n1,2,1\n", [], "is empty in line 4"),
        ("a,y\n1,0\n" + '"2,1\n' + "3,0\n" * 9, [], "line 3 is no readable CSV (unexpected end of data)"),
        ('a,y\n1,0\n"2,1\n3,0\n"4",1\n', [], "line 3 is no readable CSV"),
        ('a,y\n"1\n",0\n2\n', [], "line 4 has 1 cell; expected 2"),
        ("a,y\n" + "".join(f"{i},{i / 7}e300\n" for i in range(200)), [], "target 'y' of 'table' is too large to be"),
        ("a,y\n" + "".join(f"{i},{i / 7}e-300\n" for i in range(60)), [], "target 'y' of 'table' differs too little"),
        ("a,y\n" + "".join(f"{i}e-300,{i % 2}\n" for i in range(60)), [], "column 'a' of 'table' differs too little"),
        ("2019,2020,y\n" + "1,2,yes\n3,4,no\n" * 9, [], "line 1 has 'y' where all others have one of several"),
        ("a,y\n" + "".join(f"{(-1) ** i}e308,{i % 2}\n" for i in range(40)), [], "is too large to be standardised"),
        ("a,y\n1,3\n2,4\n5,6\n", ["--task", "classification"], "too many for classes"),
        ("a,y\n1,3\n2,4\n5,3\n6,4\n", [], "too few to split"),
    ],
)
def test_unusable_csv(tmp_path, capsys, text, options, expected):
    path = tmp_path / "table.csv"
    path.write_text(text)
    message = sentence(capsys, "train", "--data", str(path), *options)
    assert expected in message


def test_binary_csv(tmp_path, capsys):
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b\n\xff\xfe\x00,1\n")
    assert "is not UTF-8 text" in sentence(capsys, "train", "--data", str(path))
    (tmp_path / "folder.csv").mkdir()
    assert "can't be read" in sentence(capsys, "train", "--data", str(tmp_path / "folder.csv"))


@pytest.mark.parametrize(
    "labels, classes",
    [
        ([2**53 + i for i in range(3)], [str(2**53 + i) for i in range(3)]),
        ([-(2**62), 2**62 + 1], [str(-(2**62)), str(2**62 + 1)]),
        ([2**64 - 2, 2**64 - 1], [str(2**64 - 2), str(2**64 - 1)]),
        (["007", "07", "7"], ["007", "07", "7"]),
        ([10, 9, -1], ["-1", "9", "10"]),
        ([1.0, 2.0, 2.5], ["1", "2", "2.5"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["csv", "npz"])
def test_labels_stay_what_they_are(tmp_path, labels, classes, suffix):
    path = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        path.write_text("x,y\n" + "".join(f"{i},{label}\n" for i in range(20) for label in labels))
    else:
        np.savez(path, x=np.arange(20.0 * len(labels))[:, None], y=np.array(20 * labels))
    data = load_data(path)
    assert data.class_names == classes and data.train[1].bincount().tolist() == [13] * len(labels)


def test_csv_may_start_with_an_empty_line(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\n  \na;y\n" + "1;0\n\n2;1\n" * 9)
    assert load_data(str(path)).feature_names == ["a"]


@pytest.mark.parametrize(
    "arguments, expected",
    [((3,), "data is 3; expected digits"), (("digits", "task", "foo"), "task is 'foo'; expected classification or"),
     (("digits", "seed", "a"), "seed is 'a'; expected a whole number"), (("digits", "seed", -1), "seed is -1")],
)  # fmt: skip
def test_load_data_refuses(arguments, expected):
    source, *option = arguments
    with pytest.raises(InputError, match=expected):
        load_data(source, **dict([option] if option else []))


@pytest.mark.parametrize(
    "arrays, expected",
    [
        ({"inputs": np.ones((4, 2))}, "has no array x and no array y"),
        ({"x": np.ones((4, 2))}, "has no array y; expected"),
        ({"x": np.ones(4), "y": np.ones(4)}, "array x of"),
        ({"x": np.ones((4, 2)), "y": np.ones(3)}, "expected numbers of at most 64 bits, or words, of shape (4,)"),
        ({"x": np.ones((4, 2), np.longdouble), "y": np.ones(4)}, "expected numbers of at most 64 bits"),
        ({"x": np.ones((4, 2)), "y": np.ones(4, np.longdouble)}, "expected numbers of at most 64 bits"),
        ({"x": np.full((4, 2), np.nan), "y": np.ones(4)}, "array x of"),
        ({"x": np.ones((4, 2)), "y": np.array([1, 2, np.inf, 0])}, "is not finite at [2]"),
        ({"x": np.ones((4, 2), dtype=object), "y": np.ones(4)}, "not a readable NPZ file"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "holds no data: 0 samples"),
    ],
)
def test_unusable_npz(tmp_path, capsys, arrays, expected):
    path = tmp_path / "table.npz"
    np.savez(path, **arrays)
    assert expected in sentence(capsys, "train", "--data", str(path))


@pytest.mark.parametrize("content, expected", [(b"", "is empty"), (b"not a zip file", "not a readable NPZ file")])
def test_damaged_npz(tmp_path, capsys, content, expected):
    path = tmp_path / "table.npz"
    path.write_bytes(content)
    assert expected in sentence(capsys, "train", "--data", str(path))


def test_unnamed_column_that_counts_nothing(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text(",a,y\n" + "".join(f"{i * i},{i},{i % 2}\n" for i in range(60)))
    assert load_data(str(path)).feature_names == ["", "a"]
