"""The learner's side: python -m gdbp train, and the examples."""

import csv
import json
import math
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gdbp
from gdbp.__main__ import main
from gdbp.train import InputError, load_data, load_run
from gdbp.train.rules import RULES
from gdbp.train.schedule import SCHEDULES

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def flowers(tmp_path):
    """60 samples of two classes in words, told apart by one of three inputs."""
    random = np.random.default_rng(0)
    lines = ["length,width,height,kind"]
    for i in range(60):
        a, b, c = random.normal(size=3)
        lines.append(f"{a + 4 * (i % 2):.4f},{b:.4f},{c:.4f},{('iris', 'rose')[i % 2]}")
    path = tmp_path / "flowers.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def waves(tmp_path):
    """80 samples for regression, with inputs of shape (2, 2)."""
    random = np.random.default_rng(1)
    x = random.normal(size=(80, 2, 2)).astype(np.float32)
    path = tmp_path / "waves.npz"
    np.savez(path, x=x, y=100 + 30 * x[:, 0, 0] - 10 * x[:, 1, 1])
    return str(path)


def train(out: Path, *options: str) -> dict:
    assert main(["train", "--quiet", "--out", str(out), *options]) == 0
    return json.loads((out / "config.json").read_text())


def figures(out: Path) -> list[dict[str, str]]:
    with open(out / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def sentence(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that must end with status 2."""
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("gdbp: ")
    assert "written" not in captured.out
    return captured.err


# What a first network reaches


@pytest.mark.parametrize("seed", range(5))
def test_digits(tmp_path, seed):
    assert train(tmp_path, "--seed", str(seed))["test"]["accuracy"] >= 0.975


def test_breast_cancer(tmp_path):
    assert train(tmp_path, "--data", "breast-cancer")["test"]["accuracy"] >= 0.95


def test_diabetes(tmp_path):
    config = train(tmp_path, "--data", "diabetes")
    assert config["test"]["r2"] >= 0.35
    assert config["test"]["rmse"] == pytest.approx(math.sqrt(config["test"]["loss"]) * config["data"]["y_std"])


# The command


def test_run_folder(tmp_path, flowers, capsys):
    out = tmp_path / "run"
    assert main(["train", "--data", flowers, "--epochs", "12", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "2 classes" in captured.out and "accuracy" in captured.out and str(out) in captured.out
    assert captured.err == ""  # no bar where there is no terminal
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "loss.png",
        "metrics.csv",
        "model.safetensors",
    ]
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = figures(out)
    assert list(rows[0]) == [
        "epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy", "grad_norm", "lr",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 13)]
    config = json.loads((out / "config.json").read_text())
    assert config["data"]["classes"] == ["iris", "rose"]
    assert config["options"]["optimizer"] == "adamw" and config["seed"] == 0
    assert set(config["versions"]) == {"gdbp", "torch", "python"}


def test_run_can_be_used_again(tmp_path, flowers, waves):
    config = train(tmp_path / "flowers", "--data", flowers, "--epochs", "20")
    run, data = load_run(tmp_path / "flowers"), load_data(flowers)
    raw = data.test[0].double() * data.x_std + data.x_mean
    kinds = [data.class_names[i] for i in data.test[1]]
    right = sum(a == b for a, b in zip(run.predict(raw), kinds)) / len(kinds)
    assert right == pytest.approx(config["test"]["accuracy"])
    for x, expected in (
        ([[1.0, 2.0]], r"x has shape \(1, 2\); expected \(samples, 3\)"),
        ([[1.0, 2.0, math.nan]], r"x is nan at \[0, 2\], column 'height'; expected finite numbers"),
        ([["a", "b", "c"]], "x can't be made a tensor of numbers: "),
        ([[1.0], [1.0, 2.0]], "x can't be made a tensor of numbers: "),
    ):
        with pytest.raises(InputError, match=expected):
            run.predict(x)

    config = train(tmp_path / "waves", "--data", waves, "--epochs", "20")
    run, data = load_run(tmp_path / "waves"), load_data(waves)
    values = torch.tensor(run.predict(data.test[0].double() * data.x_std + data.x_mean))
    truth = data.test[1][:, 0] * data.y_std + data.y_mean
    assert (values - truth).square().mean().sqrt().item() == pytest.approx(config["test"]["rmse"], rel=1e-4)


def test_a_test_sample_far_off(tmp_path):
    """Its loss is not finite, and config.json is JSON all the same."""
    for outlier in range(60):
        x = np.arange(60.0)[:, None]
        x[outlier] = 1e60
        np.savez(tmp_path / "far.npz", x=x, y=np.arange(60) % 2)
        if load_data(tmp_path / "far.npz").test[0].isinf().any():
            break
    config = train(tmp_path / "run", "--data", str(tmp_path / "far.npz"), "--epochs", "1")
    assert config["test"]["loss"] is None and config["last_epoch"]["train_loss"] > 0


def test_load_run_without_a_run(tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        load_run(tmp_path)


@pytest.mark.parametrize("name, content", [("config.json", "{"), ("config.json", "{}"), ("model.safetensors", "no")])
def test_load_run_of_a_damaged_folder(tmp_path, flowers, name, content):
    folder = tmp_path / "run"
    assert main(["train", "--data", flowers, "--epochs", "1", "--out", str(folder), "--quiet"]) == 0
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match="holds a damaged run: "):
        load_run(folder)


def test_same_seed_same_metrics(tmp_path, flowers):
    for name, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        train(tmp_path / name, "--data", flowers, "--epochs", "4", "--seed", seed)
    assert figures(tmp_path / "a") == figures(tmp_path / "b") != figures(tmp_path / "c")


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_optimizers_and_schedules(tmp_path, waves, optimizer, schedule):
    options = [
        "--data",
        waves,
        "--optimizer",
        optimizer,
        "--schedule",
        schedule,
        "--epochs",
        "20",
        "--noise",
        "0",
    ]
    config = train(tmp_path, *options)
    rows = figures(tmp_path)
    assert float(rows[-1]["train_loss"]) < 0.7 * float(rows[0]["train_loss"])
    assert config["options"]["schedule"] == schedule


@pytest.mark.parametrize("source", ["flowers", "waves"])
@pytest.mark.parametrize(
    "method, options",
    [("batch", []), ("stochastic", []), ("minibatch", []), ("minibatch", ["--batch-size", "7"])],
)
def test_methods(tmp_path, request, source, method, options):
    data = request.getfixturevalue(source)
    config = train(tmp_path, "--data", data, "--method", method, "--epochs", "8", *options)
    samples = len(load_data(data).train[0])
    size = {"batch": samples, "stochastic": 1}.get(method, 7 if options else 32)
    assert config["batch_size"] == size
    rows = figures(tmp_path)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


@pytest.mark.parametrize("activation", ["relu", "gelu", "sigmoid", "tanh"])
@pytest.mark.parametrize("init", ["xavier", "he", "xavier_normal", "he_uniform"])
def test_networks(tmp_path, flowers, activation, init):
    options = [
        "--hidden",
        "8,4",
        "--activation",
        activation,
        "--init",
        init,
        "--epochs",
        "2",
        "--clip",
        "0.5",
    ]
    assert train(tmp_path, "--data", flowers, *options)["network"]["sizes"] == [3, 8, 4, 2]


def test_no_hidden_layer(tmp_path, waves):
    options = ["--hidden", "0", "--epochs", "60", "--noise", "0", "--l2", "0", "--lr", "0.1"]
    config = train(tmp_path, "--data", waves, *options)
    assert config["network"]["sizes"] == [4, 1]
    assert config["test"]["r2"] > 0.99  # the target is linear


def test_regularisation(tmp_path, waves):
    common = ["--data", waves, "--epochs", "60", "--optimizer", "sgd", "--batch-size", "8", "--keep", "last"]
    train(tmp_path / "plain", *common)
    train(tmp_path / "l1", *common, "--l1", "0.05")
    train(tmp_path / "l2", *common, "--l2", "0.5")
    plain, l1, l2 = (load_run(tmp_path / name).model.state_dict()["0.weight"] for name in ("plain", "l1", "l2"))
    assert (l1 == 0).float().mean() > 0.3 and (plain == 0).sum() == 0
    assert l2.norm() < 0.7 * plain.norm()


def test_default_folder(tmp_path, flowers, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--quiet", "--data", flowers, "--epochs", "1"]) == 0
    assert len(list(Path("runs").glob("flowers-*/config.json"))) == 2


def test_progress_bar(tmp_path, flowers, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["train", "--data", flowers, "--epochs", "2", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().err
    for figure in ("epoch 2", "loss", "accuracy", "|grad|", "lr"):
        assert figure in shown


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


# What a user can mend: one sentence, status 2


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], "COMMAND"),
        (["train", "--data", "iris"], "data 'iris' is unknown; expected digits, breast-cancer, diabetes"),
        (["train", "--data", "no/such.csv"], "data file 'no/such.csv' does not exist"),
        (["train", "--data", "no/such.npz"], "data file 'no/such.npz' does not exist"),
        (["train", "--optimizer", "adma"], "--optimizer: invalid choice: 'adma'"),
        (["train", "--schedule", "linear"], "--schedule: invalid choice"),
        (["train", "--init", "zeros"], "symmetry is never broken"),
        (["train", "--init", "lecun"], "scheme 'lecun' is unknown"),
        (["train", "--hidden", "64;32"], "expected whole numbers above 0 and commas"),
        (["train", "--hidden", "\u00b2"], "expected whole numbers above 0 and commas"),
        (["train", "--hidden", "9" * 20], "expected whole numbers above 0 and commas"),
        (["train", "--hidden", "100000000,100000000"], "can't be made"),
        (["train", "--seed", str(2**64)], "expected a whole number from 0 to 4294967295"),
        (["train", "--epochs", "0"], "expected a whole number of at least 1"),
        (["train", "--epochs", "9" * 5000], f"got '{'9' * 50}...'; expected a whole number of at least 1"),
        (["train", "--epochs", "--5"], "expected one argument"),
        (["train", "--batch-size", "x"], "got 'x'; expected a whole number of at least 1"),
        (["train", "--lr", "-1"], "expected a finite number above 0"),
        (["train", "--lr", "nan"], "expected a finite number above 0"),
        (["train", "--lr", "1e400"], "expected a finite number above 0"),
        (["train", "--noise", "inf"], "expected a finite number of at least 0"),
        (["train", "--l1", "-1"], "expected a finite number of at least 0"),
        (["train", "--data", "diabetes", "--label-smoothing", "0.1"], "--label-smoothing is for classes"),
        (["train", "--data", "a\0.csv"], "does not exist"),
        (["train", "--out", "\0"], "can't be written to (embedded null byte)"),
        (["train", "--label-smoothing", "2"], "of at least 0 and at most 1"),
        (["train", "--clip", "0"], "expected a finite number above 0"),
        (["train", "--batch-size", "5000"], "batch size 5000 is out of range; expected 1 to the 1169 training samples"),
        (["train", "--method", "batch", "--batch-size", "8"], "goes with method minibatch, not batch"),
        (["train", "--device", "abacus"], "--device 'abacus' is unknown"),
        (["train", "--target", "age"], "target 'age' names a column of a .csv file"),
        (["train", "--data", "digits", "--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_unusable_options(capsys, options, expected):
    assert expected in sentence(capsys, *options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_without_cuda(capsys):
    assert "--device cuda can't be used" in sentence(capsys, "train", "--device", "cuda")


def test_diverging_loss(tmp_path, waves, capsys):
    options = [
        "--data",
        waves,
        "--optimizer",
        "sgd",
        "--lr",
        "1e30",
        "--schedule",
        "constant",
        "--activation",
        "relu",
    ]
    message = sentence(capsys, "train", *options, "--out", str(tmp_path / "new" / "run"))
    assert "in epoch 1; use --lr 0.1 or --clip 1" in message
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options, remedy",
    [(["--lr", "5"], "use --lr 0.05 or --clip 1"), (["--noise", "1e300"], "use a smaller --noise or --lr 0.005 or"),
     (["--l2", "1e300"], "use a smaller --l2 or --lr 0.005 or")],
)  # fmt: skip
def test_a_loss_that_grew(tmp_path, waves, capsys, options, remedy):
    common = ["--data", waves, "--optimizer", "momentum", "--schedule", "constant", "--epochs", "3"]
    message = sentence(capsys, "train", *common, *options, "--out", str(tmp_path / "run"))
    assert "loss" in message and remedy in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("source", ["flowers", "waves"])
def test_no_better_than_a_guess(tmp_path, request, capsys, source):
    train(tmp_path, "--data", request.getfixturevalue(source), "--epochs", "1", "--hidden", "0", "--lr", "1e-9")
    assert capsys.readouterr().err.startswith("gdbp: the network is no better than a guess (")


@pytest.mark.parametrize("optimizer", RULES)
@pytest.mark.parametrize("data, figure, least", [("breast-cancer", "accuracy", 0.95), ("diabetes", "r2", 0.35)])
def test_stochastic_learns_with_every_optimizer(tmp_path, data, figure, least, optimizer):
    options = ["--data", data, "--method", "stochastic", "--optimizer", optimizer, "--schedule", "constant"]
    assert train(tmp_path, *options)["test"][figure] >= least


@pytest.mark.parametrize("optimizer", RULES)
def test_stochastic_learns_digits(tmp_path, optimizer):
    options = ["--method", "stochastic", "--optimizer", optimizer, "--schedule", "constant", "--epochs", "5"]
    assert train(tmp_path, *options)["test"]["accuracy"] >= 0.95


def test_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "can't be written to" in sentence(capsys, "train", "--out", str(out))


@pytest.mark.parametrize("module", ["numpy", "sklearn", "matplotlib", "safetensors", "tqdm"])
def test_missing_package(tmp_path, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "tqdm":
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    message = sentence(capsys, "train", "--out", str(tmp_path))
    package = {"sklearn": "scikit-learn"}.get(module, module)
    assert f"needs {package}" in message and "pip install 'gdbp[train]'" in message


# The examples


def test_first_network(capsys):
    runpy.run_path(str(EXAMPLES / "first_network.py"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert float(last.split()[-1].rstrip("%")) >= 96


def test_swap_optimizer(capsys):
    result = runpy.run_path(str(EXAMPLES / "swap_optimizer.py"))
    assert result["after"] == pytest.approx(result["before"], rel=1e-2) and result["after"] < 1e-3
    assert "gdbp.optim.AdamW" in capsys.readouterr().out


def test_warm_memory(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["warm_memory.py", "--width", "64", "--steps", "8"])
    try:
        runpy.run_path(str(EXAMPLES / "warm_memory.py"))
    finally:
        gdbp.memory.disable_cpu_cache()
    first, last = capsys.readouterr().out.splitlines()
    assert not first.endswith(" 0 MiB in the cache's hands") and last.endswith("ms a step")


@pytest.mark.parametrize("option", ["batch", "width", "classes", "steps"])
def test_warm_memory_refuses(capsys, monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["warm_memory.py", f"--{option}", "0"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "warm_memory.py"))
    assert stop.value.code == 2 and f"--{option} is 0; expected at least 1\n" in capsys.readouterr().err
