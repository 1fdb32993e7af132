"""Forwards that torch.fx traces, or cannot: what they do besides calling layers stays as it was."""

import collections
import copy
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gdbp
from tests.fuse_models import fused, reasons


class Odd(nn.Module):
    """A linear layer and an activation, in a forward that is given."""

    def __init__(self, forward):
        super().__init__()
        self.fc, self.act, self.calls, self.seen = nn.Linear(4, 4), nn.ReLU(), 0, []
        self.other, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.recent, self.counter, self.nested = collections.deque(), collections.Counter(), {"seen": []}
        self.child = nn.Identity()
        self.plain = torch.ones(4)
        self.register_buffer("count", torch.zeros(()))
        self.__class__ = type("Odd", (Odd,), {"forward": forward})


def optional(self, x, scale=None):
    return self.act(self.fc(x)) if scale is None else self.act(self.fc(x * scale))


def depends_on_data(self, x):
    return self.act(self.fc(x)) if x.sum() > 0 else x


def depends_on_training(self, x):
    return F.dropout(self.act(self.fc(x)), 0.5, self.training)


def depends_on_a_layers_training(self, x):
    return F.dropout(self.act(self.fc(x)), 0.5, self.child.training)


def asks_what_a_result_is(self, x):
    y = self.act(self.fc(x))
    return y * 2 if isinstance(x * 2, torch.Tensor) else y


def asks_for_what_tensors_have_not(self, x):
    return self.act(self.fc(x.tensors if hasattr(x, "tensors") else x))


def hooks_on_saved_tensors(self, x):
    with torch.autograd.graph.save_on_cpu():
        return self.act(self.fc(x))


def counts(self, x):
    self.calls += 1
    return self.act(self.fc(x))


def remembers(self, x):
    self.seen.append(x)
    return self.act(self.fc(x))


def remembers_in_a_deque(self, x):
    self.recent.append(x)
    return self.act(self.fc(x))


def remembers_deeper(self, x):
    self.nested["seen"].append(x)
    return self.act(self.fc(x))


def counts_by_name(self, x):
    self.counter["calls"] += 1
    return self.act(self.fc(x))


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


def reverses(self, x):
    return self.act(self.fc(Reversal.apply(x)))


def without_gradients(self, x):
    with torch.no_grad():
        return self.act(self.fc(x))


@torch.no_grad()
def decorated(self, x):
    return self.act(self.fc(x))


def in_inference_mode(self, x):
    with torch.inference_mode():
        return self.act(self.fc(x))


def without_autocast(self, x):
    with torch.autocast("cpu", enabled=False):
        return self.act(self.fc(x))


def checkpointed(self, x):
    return checkpoint(lambda x: self.act(self.fc(x)), x, use_reentrant=False)


def checkpointed_with_reentry(self, x):
    return checkpoint(lambda x: self.act(self.fc(x)), x, use_reentrant=True)


def ordered(self, x):
    return collections.OrderedDict(a=self.act(self.fc(x)))


def keeps(self, x):
    self.hidden = self.fc(x)
    return self.act(self.hidden)


def keeps_elsewhere(self, x):
    self.child.hidden = x
    return self.act(self.fc(x))


def writes(self, x):
    self.plain.mul_(2)
    return self.act(self.fc(x)) + self.plain


def draws(self, x):
    return self.act(self.fc(x)) + torch.randn(4)


FORWARDS = {
    optional: "the forward of Odd has arguments that may be left out (scale)",
    depends_on_data: "torch.fx cannot follow the forward of Odd: symbolically traced variables cannot",
    depends_on_training: "the forward of Odd is another in training than in evaluation",
    depends_on_a_layers_training: "the forward of Odd is another in training than in evaluation",
    asks_what_a_result_is: "torch.fx cannot follow the forward of Odd: it asks what kind of thing a result is",
    asks_for_what_tensors_have_not: "torch.fx cannot follow the forward of Odd: it asks its argument for tensors, whi",
    hooks_on_saved_tensors: "torch.fx cannot follow the forward of Odd: it has hooks on saved tensors",
    counts: "the forward of Odd changes self.calls",
    remembers: "the forward of Odd changes self.seen",
    remembers_in_a_deque: "the forward of Odd changes self.recent",
    remembers_deeper: "the forward of Odd changes self.nested",
    counts_by_name: "the forward of Odd changes self.counter",
    reverses: "torch.fx cannot follow the forward of Odd: it calls an autograd.Function, which would not be recorded",
    without_gradients: "torch.fx cannot follow the forward of Odd: it switches gradients or autocast",
    decorated: "torch.fx cannot follow the forward of Odd: it switches gradients or autocast",
    in_inference_mode: "torch.fx cannot follow the forward of Odd: it switches gradients or autocast",
    without_autocast: "torch.fx cannot follow the forward of Odd: it switches gradients or autocast",
    checkpointed: "torch.fx cannot follow the forward of Odd: it is checkpointed",
    checkpointed_with_reentry: "torch.fx cannot follow the forward of Odd: it calls an autograd.Function",
    ordered: "torch.fx cannot follow the forward of Odd: it makes a container of class OrderedDict",
    keeps: "the forward of Odd changes self.hidden",
    keeps_elsewhere: "the forward of Odd changes Identity.hidden",
    writes: "the forward of Odd changes self.plain",
    draws: "the forward of Odd makes a tensor (_tensor_constant0), which would become a constant",
}


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_forwards_that_do_more_than_their_graph(forward):
    model = Odd(forward)
    kept, state = dict(vars(model)), torch.get_rng_state()
    kept["seen"], plain = [], model.plain.clone()
    cls = type(model)
    _, report = fused(model)
    assert not report.fused and reasons(report)["fc"].startswith(FORWARDS[forward])
    assert type(model) is cls and torch.equal(torch.get_rng_state(), state) and torch.equal(model.plain, plain)
    assert vars(model).keys() == kept.keys() and model.calls == 0 and model.seen == []
    assert not model.recent and not model.counter and model.nested == {"seen": []}
    assert Reversal.apply(torch.ones(1, requires_grad=True)).requires_grad  # tracing leaves nothing behind
    assert not hasattr(model.child, "hidden")


def test_buffers_that_forward_changes_in_place_still_change():
    def forward(self, x):
        self.count.add_(1)
        return self.act(self.fc(x)) * self.count

    model, report = fused(Odd(forward))
    assert len(report.fused) == 1 and model.count == 0
    x = torch.ones(2, 4)
    first, second = model(x), model(x)
    assert model.count == 2
    torch.testing.assert_close(second, 2 * first)


def test_values_that_are_used_twice():
    def forward(self, x):
        h = self.fc(x)
        return self.act(h) + h

    _, report = fused(Odd(forward))
    assert reasons(report)["fc"] == "its output is used more than once"


def test_what_forward_does_later_stays_later():
    def forward(self, x):
        h = self.fc(x)
        x.add_(1)
        return self.act(h) + x

    plain = Odd(forward)
    model = gdbp.fuse(copy.deepcopy(plain))
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x.clone()), plain(x.clone()))


def adds_to_a_view(self, x):
    y = F.gelu(self.fc(x))
    h = y[:, :2]
    h += 1
    return y


def adds_to_its_input(self, x):
    x = x * 1
    before = x
    x += self.other.weight[0]
    return F.gelu(self.fc(x)) + before


def adds_to_a_buffer(self, x):
    y = self.act(self.fc(x))
    count = self.count
    count += y.detach().mean()
    return y


def asks_for_a_tensor(self, x):
    if isinstance(x, torch.Tensor):
        x = x * 2
    y = self.act(self.fc(x))
    return y if isinstance(y.shape, torch.Tensor) else y + 1


def norm_called_in_another_order(self, x):
    a, b = self.fc(x), self.other(x)
    z = self.act(self.norm(b))
    return self.act(self.norm(a)) + z


def reads_statistics_before_they_move(self, x):
    a = self.fc(x)
    mean = self.norm.running_mean.clone()
    return self.act(self.norm(a)) + mean


def writes_before_the_norm(self, x):
    x = x * 1
    a = self.fc(x.clone())
    x.add_(1)
    return self.act(self.norm(a)) + x


def writes_over_leaky_relu(self, x):
    return F.leaky_relu(self.fc(x)).add_(x)


def writes_over_a_view_of_softplus(self, x):
    y = F.softplus(self.fc(x))
    y.view(-1)[:3] += 1
    return y


def drops_softplus_in_place(self, x):
    return F.dropout(F.softplus(self.fc(x)), 0.0, True, True)


def adds_behind_leaky_relu(self, x):
    return F.leaky_relu(self.fc(x)) + x


def writes_over_an_unknown_view_of_leaky_relu(self, x):
    y = F.leaky_relu(self.fc(x)).view_as(x)
    y *= 2
    return y


def asks_torch_for_a_tensor(self, x):
    y = self.act(self.fc(x))
    return y * 2 if torch.is_tensor(x) and not isinstance(x, nn.Parameter) else y


FOLLOWED = {
    asks_torch_for_a_tensor: 1, writes_over_an_unknown_view_of_leaky_relu: 0,
    adds_to_a_view: 1, adds_to_its_input: 1, adds_to_a_buffer: 1, asks_for_a_tensor: 1,
    norm_called_in_another_order: 2, reads_statistics_before_they_move: 1, writes_before_the_norm: 1,
    writes_over_leaky_relu: 0, writes_over_a_view_of_softplus: 0, drops_softplus_in_place: 0, adds_behind_leaky_relu: 1,
}  # fmt: skip


@pytest.mark.parametrize("forward", FOLLOWED, ids=lambda f: f.__name__)
def test_order_and_writing_in_place_stay(forward):
    torch.manual_seed(0)
    plain = Odd(forward)
    model, report = fused(copy.deepcopy(plain))
    assert len(report.fused) == FOLLOWED[forward]
    for _ in range(2):
        x = torch.randn(3, 4)
        for each in (model, plain):
            each.zero_grad()
            each(x.clone()).square().sum().backward()
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_arguments_of_another_kind_take_the_forward_from_before():
    def of_either(self, x):
        return self.act(self.fc(x["x"] if isinstance(x, dict) else x))

    model, report = fused(Odd(of_either))
    x = torch.randn(3, 4)
    assert len(report.fused) == 1 and torch.equal(model({"x": x}), model(x))

    class Mine(torch.Tensor):
        pass

    def of_kinds(self, x):
        y = self.act(self.fc(x))
        return 100 * y if isinstance(x, (Mine, nn.Parameter)) else y

    model, report = fused(Odd(of_kinds))
    assert len(report.fused) == 1
    for other in (x.as_subclass(Mine), nn.Parameter(x)):
        torch.testing.assert_close(model(other).as_subclass(torch.Tensor), 100 * model(x))


class Decides(nn.Module):
    """A forward that goes by attributes of many kinds."""

    gain = 2.0

    def __init__(self):
        super().__init__()
        self.fc, self.out, self.blocks = nn.Linear(4, 8), nn.Linear(8, 2), nn.ModuleList([nn.Linear(8, 8)])
        self.alpha, self.twice, self.act, self.norm, self.sizes = 1.0, True, F.relu, None, [1.0, 2.0]
        self.register_parameter("shift", None)
        self.child, self._halves = nn.Identity(), 1
        self.child.scale, self.seen = 3.0, {i: i for i in range(1000)}

    @property
    def temperature(self):
        return self._halves * 0.5

    def forward(self, x):
        h = F.relu(self.fc(x)) * (self.alpha * self.gain / self.temperature)
        for block in self.blocks:
            h = self.act(block(h))
        h = h * 2 if self.twice else h
        h = h if self.norm is None else self.norm(h)
        h = h if self.shift is None else h + self.shift
        return self.out(h) * self.sizes[1] * self.child.scale * len(self.seen)


CHANGES = {
    "a number": lambda m: setattr(m, "alpha", 0.3),
    "a switch": lambda m: setattr(m, "twice", False),
    "a function": lambda m: setattr(m, "act", torch.tanh),
    "the class's number": lambda m: setattr(m, "gain", 0.1),
    "behind a property": lambda m: setattr(m, "_halves", 7),
    "of a child": lambda m: setattr(m.child, "scale", 0.5),
    "in a list": lambda m: m.sizes.__setitem__(1, 9.0),
    "how many": lambda m: m.seen.pop(0),
    "another layer in a list": lambda m: m.blocks.append(nn.Linear(8, 8)),
    "a layer that was left out": lambda m: setattr(m, "norm", nn.LayerNorm(8)),
    "a parameter that was left out": lambda m: setattr(m, "shift", nn.Parameter(torch.ones(8))),
}


@pytest.mark.parametrize("how", ["as it is", "copied", "pickled", "compiled"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_attributes_that_change_later(change, how):
    torch.manual_seed(0)
    plain = Decides()
    model, report = fused(copy.deepcopy(plain))
    assert len(report.fused) == 2
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="eager") if how == "compiled" else model
    x = torch.randn(3, 4)
    before = call(x)
    assert "gdbp.linear" in str(gdbp.explain(model, x))
    torch.testing.assert_close(before, plain(x))
    for each in (model, plain):
        torch.manual_seed(1)
        change(each)
    after = call(x)
    torch.testing.assert_close(after, plain(x))
    assert not torch.allclose(after, before)


def test_attributes_that_only_the_class_knows():
    class Knows(Decides):
        def __getattribute__(self, name):
            return 3.0 if name == "virtual" else super().__getattribute__(name)

        def __getattr__(self, name):
            return self.sizes[0] if name == "first" else super().__getattr__(name)

        def forward(self, x):
            return F.relu(self.fc(x)) * self.virtual * self.first

    model, report = fused(Knows())
    x = torch.randn(3, 4)
    before = model(x)
    assert len(report.fused) == 1
    model.sizes[0] = 5.0
    torch.testing.assert_close(model(x), 5 * before)


def test_numbers_that_are_not_known_yet():
    def scaled(self, x):
        return self.act(self.fc(x)) / math.sqrt(x.size(-1))

    original, seen = math.prod, []

    def looks(self, x):
        seen.append(math.prod)
        return self.act(self.fc(x))

    # Dynamo, where a traced forward makes it come, would take torch.fx's functions for math's own.
    fused(Odd(looks))
    assert seen and all(function is original for function in seen)
    model, report = fused(Odd(scaled))
    assert len(report.fused) == 1 and torch.equal(model(torch.ones(3, 4)), model.act(model.fc(torch.ones(3, 4))) / 2)
    assert math.prod is original


class Slice(nn.Module):
    def forward(self, x):
        return x[:]


@pytest.mark.parametrize(
    "behind",
    [
        lambda: (nn.LeakyReLU(), Slice(), nn.ReLU(inplace=True)),
        lambda: (nn.Softplus(), nn.AlphaDropout(0.5), nn.ReLU(inplace=True)),
        lambda: (nn.Softplus(), nn.Sequential(nn.ReLU(inplace=True))),
    ],
)
def test_layers_that_may_return_views(behind):
    model, report = fused(nn.Sequential(nn.Linear(4, 4), *behind()).eval())
    assert not report.fused
    model(torch.randn(3, 4)).sum().backward()


def test_other_threads_go_on():
    """torch.fx shows a tracer the calls of all threads, and what stands in for torch's functions goes again."""
    originals, errors, counts, is_over = torch._C._set_grad_enabled, [], [], threading.Event()

    def work():
        layer, x = nn.Linear(4, 4), torch.randn(3, 4)
        while not is_over.is_set():
            try:
                with torch.no_grad():
                    layer(x)
            except Exception as error:
                errors.append(error)
                return

    def fuse():
        counts.extend(len(fused(Odd(adds_behind_leaky_relu))[1].fused) for _ in range(20))

    workers, fusers = ([threading.Thread(target=target) for _ in range(2)] for target in (work, fuse))
    for thread in (*workers, *fusers):
        thread.start()
    for thread in fusers:
        thread.join()
    is_over.set()
    for thread in workers:
        thread.join()
    assert not errors and counts == [1] * 40 and torch._C._set_grad_enabled is originals


def test_torch_fx_sees_our_layers_as_it_sees_torchs():
    ours = nn.Sequential(gdbp.nn.Linear(4, 5, activation="relu"), gdbp.nn.BatchNorm1d(5), gdbp.nn.MLP([5, 6, 2])).eval()
    traced, x = torch.fx.symbolic_trace(ours), torch.randn(3, 4)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2.0", "2.1"]
    torch.testing.assert_close(traced(x), ours(x))
    layer = gdbp.nn.Linear(4, 5, activation="relu")
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
    traced = torch.fx.symbolic_trace(gdbp.fuse(nn.Sequential(nn.Linear(4, 5), nn.ReLU())))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1"]


def test_sequentials_whose_layers_write_in_place():
    behind = nn.LeakyReLU(), nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.Linear(4, 1)
    model, report = fused(nn.Sequential(nn.Linear(4, 4), *behind))
    assert not report.fused and "whose output something writes over" in reasons(report)["0"]
    model(torch.randn(3, 4)).sum().backward()
    model, report = fused(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), *behind))
    assert [run.layers for run in report.fused] == [("0", "1")] and "writes over its output" in reasons(report)["2"]
    model(torch.randn(3, 4)).sum().backward()
    for last in (nn.ReLU(inplace=True), nn.Tanh()):
        _, report = fused(nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 4), last))
        assert len(report.fused) == 2


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_scripted_modules_stay_as_they_are():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model, report = fused(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), scripted))
    assert [run.layers for run in report.fused] == [("0", "1")] and model(torch.randn(2, 4)).shape == (2, 4)
    gdbp.explain(model, torch.randn(2, 4))
