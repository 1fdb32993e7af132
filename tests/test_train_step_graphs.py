"""What ``gdbp.TrainStep`` runs as CUDA graphs, on a CPU: a replay computes anew what would have been recorded, into the
same memory. Most of what TrainStep promises is promised here, too."""

import copy
import functools
from unittest.mock import MagicMock

import pytest
import torch

import gdbp
from gdbp import nn, optim
from gdbp.step import _graphs, train_step
from tests import test_train_step, test_train_step_protocols
from tests.training import CLASSES, FEATURES, LabelsOfADevice, Pair, close, data, eager, network

BF16 = torch.bfloat16
RECORD = _graphs.record


class Recording:
    def __init__(self, run):
        self.run, self.outputs, self.replays = run, None, 0

    def __call__(self):
        self.replays += 1
        value, gradients, *labels = self.run()
        if self.outputs is None:
            self.outputs = value, gradients
        for mine, fresh in zip((self.outputs[0], *self.outputs[1]), (value, *gradients), strict=True):
            mine.copy_(fresh)
        return *self.outputs, *labels


@pytest.fixture(autouse=True)
def recordings(monkeypatch):
    made = []

    def record(run, device):
        made.append(Recording(run))
        return made[-1], 1000

    monkeypatch.setattr(_graphs, "record", record)
    monkeypatch.setattr(train_step, "_is_on_device", lambda model: True)
    return made


def replays(recordings):
    return [recording.replays for recording in recordings]


test_optimizers = test_train_step.test_optimizers
test_losses = test_train_step.test_losses
test_activations = test_train_step.test_activations
test_batch_norm = test_train_step.test_batch_norm
test_mlp_and_flatten = test_train_step.test_mlp_and_flatten
test_linear_cross_entropy_brings_its_own_layer = test_train_step.test_linear_cross_entropy_brings_its_own_layer
test_random_networks = test_train_step.test_random_networks
test_changes_between_steps = test_train_step_protocols.test_changes_between_steps
test_eager_steps_between = test_train_step_protocols.test_eager_steps_between
test_schedulers = test_train_step_protocols.test_schedulers
test_torchs_optimizer_goes_on_alone = test_train_step_protocols.test_torchs_optimizer_goes_on_alone
test_states_are_the_optimizers_own = test_train_step_protocols.test_states_are_the_optimizers_own
test_versions_are_bumped = test_train_step_protocols.test_versions_are_bumped
test_gradients = test_train_step_protocols.test_gradients
test_many = test_train_step_protocols.test_many
test_dropout = test_train_step_protocols.test_dropout
test_inputs_of_any_layout = test_train_step_protocols.test_inputs_of_any_layout


def test_recorded_on_a_stream_of_its_device(monkeypatch):
    cuda, device = MagicMock(), torch.device("cuda", 1)
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(_graphs, "_recorder", functools.cache(_graphs._recorder.__wrapped__))
    RECORD(lambda: "outputs", device)
    replay, _ = RECORD(lambda: "outputs", device)
    cuda.Stream.assert_called_once_with(device)
    assert cuda.graph.call_args.kwargs["stream"] is cuda.Stream.return_value
    assert replay() == "outputs" and cuda.CUDAGraph.return_value.replay.call_count == 1


def test_a_kind_of_batch_is_recorded_when_it_comes_again(recordings):
    pair = Pair()
    assert pair.step.memory() == {"rows": 0, "bytes": 0, "unshared_bytes": 0}
    for rows, wanted in ((16, []), (16, [1]), (3, [1]), (16, [2]), (3, [2, 1]), (3, [2, 2])):
        pair.train(1, rows)
        assert replays(recordings) == wanted
    assert pair.step.memory() == {"rows": 3, "bytes": 1000, "unshared_bytes": 1000} and pair.step.steps == 6


def test_only_so_many_graphs_are_kept(recordings):
    pair = Pair()
    for rows in range(1, _graphs.MOST_KINDS + 2):
        pair.train(2, rows)
    assert len(recordings) == _graphs.MOST_KINDS + 1
    pair.train(1, 2)
    assert len(recordings) == _graphs.MOST_KINDS + 1
    pair.train(2, 1)  # the one that was pushed out
    assert len(recordings) == _graphs.MOST_KINDS + 2


CHANGES = {
    "rate": (lambda model, optimizer: optimizer.param_groups[0].update(lr=0.3), 1),
    "mode and back": (lambda model, optimizer: model.eval().train(), 1),
    "checkpoint": (lambda model, optimizer: model.load_state_dict(copy.deepcopy(model.state_dict())), 1),
    "frozen": (lambda model, optimizer: model[0].weight.requires_grad_(False), 2),
    "moved": (lambda model, optimizer: setattr(model[0].weight, "data", model[0].weight.data.clone()), 2),
    "replaced": (lambda model, optimizer: setattr(model[1], "bias", None), 2),
    "another layer": (lambda model, optimizer: model.append(torch.nn.Tanh()), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_graphs_are_recorded_anew_where_they_no_longer_hold(name, recordings):
    change, wanted = CHANGES[name]
    pair = Pair(make=lambda model: optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    pair.train(3)
    pair.both(change)
    pair.train(3)
    assert len(recordings) == wanted


def test_stale_gradients_of_frozen_parameters_are_not_stepped():
    pair = Pair()
    for model in (pair.model, pair.twin):
        model[0].weight.grad = torch.ones_like(model[0].weight)
        model[0].weight.requires_grad_(False)
    pair.train(3)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_dropout_draws_what_it_draws_on_the_cpu(batch_norm, recordings, monkeypatch):
    torch.manual_seed(3)
    model = nn.MLP([FEATURES, 30, 20, CLASSES], dropout=0.4, batch_norm=batch_norm)
    runs = []
    for on_device in (False, True):
        monkeypatch.setattr(train_step, "_is_on_device", lambda model, on_device=on_device: on_device)
        twin = copy.deepcopy(model)
        optimizer = optim.SGD(twin.parameters(), lr=0.1)
        step = gdbp.TrainStep(twin, nn.CrossEntropyLoss(), optimizer, seed=2**64 - 5)
        losses = [step(*data(seed=i)) for i in range(3)]
        step.steps, step.seed = 77, 9
        losses += [step(*data(seed=i)) for i in range(3)]
        runs.append([*losses, *twin.parameters()])
        assert replays(recordings) == ([5] if on_device else [])
    for ours, other in zip(*runs, strict=True):
        close(ours, other)


def test_autocast(recordings):
    pair = Pair(make=lambda model: optim.SGD(model.parameters(), lr=0.1))
    pair.train(2)
    with torch.autocast("cpu", BF16):
        for i in range(3):
            batch = data(seed=i)
            ours, other = pair.step(*batch), eager(pair.twin, pair.loss, pair.other, *batch)
            assert ours.dtype is other.dtype
            torch.testing.assert_close(ours, other, rtol=0.02, atol=0.02)
    assert replays(recordings) == [1, 2]
    for p, q in zip(pair.model.parameters(), pair.twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float64, BF16, torch.float16])
def test_parameters_of_any_dtype(dtype):
    model = network(16, dtype=dtype)
    start = copy.deepcopy(model).double()
    twin = copy.deepcopy(start)
    optimizer, other = (optim.SGD(m.parameters(), lr=0.5, momentum=0.9) for m in (model, twin))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    for i in range(5):
        x, y = data(32, seed=i)
        value = step(x.to(dtype), y)
        wanted = eager(twin, nn.CrossEntropyLoss(), other, x.to(dtype).double(), y)
        assert value.dtype is dtype
        torch.testing.assert_close(value.double(), wanted, rtol=0.02, atol=0.02)
    moved = max((p - q).abs().max() for p, q in zip(start.parameters(), twin.parameters(), strict=True))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.double() - q).abs().max() < 0.05 * moved


def test_losses_are_not_overwritten():
    pair = Pair()
    values = [pair.step(*data(seed=i)) for i in range(4)]
    assert len({value.item() for value in values}) == 4


def test_statistics_have_new_versions():
    model = nn.MLP([FEATURES, 8, CLASSES], batch_norm=True)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        before = [b._version for b in model.buffers()]
        step(*data())
        assert all(b._version > old for b, old in zip(model.buffers(), before, strict=True))


@pytest.mark.parametrize("limit", [None, 0.1])
def test_a_label_out_of_range_skips_the_step(limit, monkeypatch):
    device = LabelsOfADevice()
    monkeypatch.setattr(_graphs, "_C", device)
    pair = Pair(max_grad_norm=limit)
    make_step = pair.step
    for _ in range(3):
        make_step(*data())
    before = [p.detach().clone() for p in pair.model.parameters()]
    device.bad = torch.tensor([17, 5])
    make_step(*data())
    assert all(torch.equal(p, q) for p, q in zip(pair.model.parameters(), before, strict=True))
    with pytest.raises(IndexError, match=r"Target 5 .* row 17"):
        make_step(*data())
    device.bad = torch.tensor([-1, 0])
    make_step(*data())
    assert not any(torch.equal(p, q) for p, q in zip(pair.model.parameters(), before, strict=True))
    assert device.followed == [[-1, 0]] * 4


def test_explains():
    pair = Pair(torch.nn.Sequential(nn.Linear(FEATURES, 200), torch.nn.Dropout(), nn.Linear(200, CLASSES)))
    text = pair.step.explain()
    assert "as a CUDA graph" in text and "weight of [200, 12]" in text and "after all gradients" in text
    joined = torch.nn.Sequential(nn.Linear(FEATURES, 1), torch.nn.Flatten(0))
    step = gdbp.TrainStep(joined, nn.MSELoss(), optim.SGD(joined.parameters()))
    assert "joins rows" in step.explain()


def test_what_cannot_be_recorded_is_run(monkeypatch):
    def record(run, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(_graphs, "record", record)
    pair = Pair()
    pair.train(4)
    assert "since no CUDA graph could be recorded (operation not permitted when stream is capturing)" in (
        pair.step.explain()
    )


def test_refusals_change_nothing():
    pair = Pair()
    before = [p.detach().clone() for p in pair.model.parameters()]
    x, y = data()
    for inputs, error in (((x.to("meta"), y), ValueError), ((x[:, :5], y), RuntimeError), ((x, y[:3]), ValueError)):
        for _ in range(2):
            with pytest.raises(error):
                pair.step(*inputs)
    assert all(torch.equal(p, q) for p, q in zip(pair.model.parameters(), before, strict=True))
    assert pair.step.steps == 0 and not pair.optimizer.state
    pair.train(3)
