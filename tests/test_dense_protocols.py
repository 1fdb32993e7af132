"""Dense layers and fused models in what people do with modules: physics-informed losses, per-sample gradients, export,
parametrizations, tied weights."""

import copy
import io
import math
import pickle
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap
from torch.nn.utils import parametrizations, parametrize

import gdbp
from tests.fuse_models import Attributes, Functional, Shared

DOUBLE = torch.float64
SMOOTH = ["gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "softplus"]
MODULES = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU("tanh"), "silu": nn.SiLU, "sigmoid": nn.Sigmoid,
           "tanh": nn.Tanh, "softplus": nn.Softplus}  # fmt: skip


def networks(activation, sizes=(2, 16, 16, 1)):
    """torch's network, the same of our layers, and the same fused."""
    layers = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [nn.Linear(inputs, outputs), MODULES[activation]()]
    plain = nn.Sequential(*layers, nn.Linear(*sizes[-2:])).double()
    ours = gdbp.nn.MLP(sizes, activation, dtype=DOUBLE)
    for mine, other in zip(ours, (layer for layer in plain if isinstance(layer, nn.Linear))):
        mine.load_state_dict(other.state_dict())
    return plain, ours, gdbp.fuse(copy.deepcopy(plain))


def laplace_loss(model, points):
    """Residual of u_xx + u_yy = f, by autograd twice: what a physics-informed network is trained on."""
    points = points.detach().requires_grad_()
    u = model(points)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    curvature = sum(torch.autograd.grad(slope[:, i].sum(), points, create_graph=True)[0][:, i] for i in range(2))
    source = -2 * math.pi**2 * torch.sin(math.pi * points[:, 0]) * torch.sin(math.pi * points[:, 1])
    return (curvature - source).square().mean() + u[:4].square().mean()


def laplace_loss_by_func(model, points):
    """The same by hessian and vmap."""
    parameters = dict(model.named_parameters())

    def u(point):
        return functional_call(model, parameters, point).squeeze()

    curvature = vmap(lambda point: torch.trace(hessian(u)(point)))(points)
    source = -2 * math.pi**2 * torch.sin(math.pi * points[:, 0]) * torch.sin(math.pi * points[:, 1])
    return (curvature - source).square().mean() + vmap(u)(points[:4]).square().mean()


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("loss", [laplace_loss, laplace_loss_by_func])
def test_physics_informed_loss(activation, loss):
    points = torch.rand(9, 2, dtype=DOUBLE)
    results = []
    for model in networks(activation):
        value = loss(model, points)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)])
        results[-1] = [torch.zeros(()) if t is None else t for t in results[-1]]
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[2], results[0], rtol=1e-9, atol=1e-11)


def test_physics_informed_network_learns():
    torch.manual_seed(1)
    model = gdbp.fuse(nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1)))
    optimizer = gdbp.optim.Adam(model.parameters(), lr=3e-3)
    points = torch.rand(64, 2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = laplace_loss(model, points)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.25 * losses[0]


@pytest.mark.parametrize("activation", ["relu", *SMOOTH])
def test_per_sample_gradients(activation):
    if activation == "relu":
        model = gdbp.fuse(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double())
    else:
        model = networks(activation, (3, 5, 5, 2))[2]
    parameters = dict(model.named_parameters())
    x, y = torch.randn(6, 3, dtype=DOUBLE), torch.randn(6, 2, dtype=DOUBLE)

    def loss(parameters, x, y):
        return (functional_call(model, parameters, x) - y).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(6):
        own = torch.autograd.grad(loss(parameters, x[i], y[i]), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in each.values()], list(own))
    whole = jacrev(lambda p: functional_call(model, p, x))(parameters)
    assert whole["0.weight"].shape == (6, 2, 5, 3)


@pytest.mark.parametrize("build", [Attributes, Functional, Shared])
def test_jvp_of_fused_models(build):
    plain = build().double().eval()
    model = gdbp.fuse(copy.deepcopy(plain))
    x, t = torch.randn(4, 8, dtype=DOUBLE), torch.randn(4, 8, dtype=DOUBLE)
    torch.testing.assert_close(torch.func.jvp(model, (x,), (t,)), torch.func.jvp(plain, (x,), (t,)))


# ---- export ----


@pytest.mark.parametrize("activation", [None, "relu", *SMOOTH])
@pytest.mark.parametrize("lead", [2, 3])
def test_export(activation, lead):
    layer = gdbp.nn.Linear(4, 3, activation=activation)
    rows = torch.export.Dim("rows", min=1)
    x = torch.randn(5, *[2] * (lead - 2), 4)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    assert "gdbp.linear" in str(program.graph)
    for batch in (x, torch.cat((x, x))):
        assert torch.equal(program.module()(batch), layer(batch))
    assert set(program.state_dict) == {"weight", "bias"}


@pytest.mark.parametrize("training", [True, False])
def test_export_of_a_network(training):
    model = gdbp.nn.MLP([4, 8, 3], "silu", batch_norm=True).train(training)
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), twin(x))
    assert all(map(torch.equal, exported.buffers(), twin.buffers()))


class Below(nn.Module):
    """A loss, or a layer, behind a layer that learns."""

    def __init__(self, last):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), last

    def forward(self, x, *target):
        return self.last(self.first(x), *target)


@pytest.mark.filterwarnings("error::UserWarning:torch.autograd")
@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("name", ["linear", "linear_with_pre", "mlp", "fused_sequential", "mse", "bce", "cross_entropy",
                                  "linear_cross_entropy", "batch_norm", "mlp_batch_norm", "fused_forward"])  # fmt: skip
def test_exported_programs_learn(name, decomposed):
    build, *target = PORTABLE_LOSSES[name] if name in PORTABLE_LOSSES else (PORTABLE[name],)
    module = Below(build()).train().double()
    target = [t.double() if t.is_floating_point() else t for t in target]
    twin, inputs = copy.deepcopy(module), [torch.randn(5, 8, dtype=DOUBLE) for _ in range(3)]
    program = torch.export.export(twin, (inputs[0], *target))
    assert "gdbp." in program.graph_module.code
    program = program.run_decompositions() if decomposed else program
    exported = program.module()
    learners = [(m, torch.optim.SGD(m.parameters(), 0.1)) for m in (module, exported)]
    for x in inputs:
        for model, optimizer in learners:
            optimizer.zero_grad()
            model(x, *target).square().sum().backward()
            optimizer.step()
    learnt = dict(exported.state_dict())
    for key, value in module.state_dict().items():
        torch.testing.assert_close(learnt[key], value, msg=key)


def test_operators_are_differentiated_twice():
    x, w, b = (torch.randn(*s, dtype=DOUBLE, requires_grad=True) for s in ((5, 4), (3, 4), (3,)))
    labels = torch.tensor([0, 2, 1, 1, 0])
    loss = torch.ops.gdbp.linear_cross_entropy
    for upstream in (None, torch.ones((), dtype=DOUBLE)):
        rest = (labels, None, None, None, 2, [False] * 3, -100, 0.1, 1e-3, 0.0)
        f = lambda *t: loss(upstream, *t, *rest)[0]  # noqa: B023, E731
        assert torch.autograd.gradcheck(f, (x, w, b)) and torch.autograd.gradgradcheck(f, (x, w, b))
    assert torch.autograd.gradgradcheck(lambda *t: torch.ops.gdbp.linear(*t, "tanh"), (x, w, b))


class Penalised(nn.Linear):
    def forward(self, x):
        return super().forward(x).square().sum() + gdbp.nn.utils.penalty(self, l1=0.1, l2=0.2)


# What comes out of these is read where there is no gdbp: files of torch.jit and ONNX.
PORTABLE = {
    "linear": lambda: gdbp.nn.Linear(8, 3, activation="relu"),
    "linear_with_pre": lambda: gdbp.nn.Linear(8, 3, activation="gelu"),
    "batch_norm": lambda: gdbp.nn.BatchNorm1d(8, activation="silu").eval(),
    "mlp": lambda: gdbp.nn.MLP([8, 8, 3]),
    "mlp_batch_norm": lambda: gdbp.nn.MLP([8, 8, 3], "silu", batch_norm=True).eval(),
    "fused_sequential": lambda: gdbp.fuse(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))),
    "fused_forward": lambda: gdbp.fuse(Attributes().eval()),
    "penalty": lambda: Penalised(8, 3),
}
LABELS = torch.tensor([0, 2, 1, 7, 5])
PORTABLE_LOSSES = {
    "mse": (gdbp.nn.MSELoss, torch.linspace(-1, 1, 40).view(5, 8)),
    "huber": (gdbp.nn.HuberLoss, torch.linspace(-1, 1, 40).view(5, 8)),
    "bce": (gdbp.nn.BCEWithLogitsLoss, torch.linspace(0, 1, 40).view(5, 8)),
    "cross_entropy": (lambda: gdbp.nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "linear_cross_entropy": (lambda: LinearLoss(), LABELS),
}


class LinearLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 8))

    def forward(self, input, target):
        return gdbp.nn.functional.linear_cross_entropy(input, self.weight, target)


def saved_trace(module, *inputs):
    """What torch.jit.trace makes of a module, as it comes out of a file."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("error", "ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("name", PORTABLE)
def test_traced_modules_are_saved_without_us(name):
    module, other = PORTABLE[name](), torch.randn(9, 8)
    traced = saved_trace(module, torch.randn(5, 8))
    assert "gdbp::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(other), module(other))
    traced(other).square().sum().backward()
    module(other).square().sum().backward()
    ours, theirs = dict(module.named_parameters()), dict(traced.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, p in ours.items():
        torch.testing.assert_close(theirs[key].grad, p.grad, msg=key)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", PORTABLE_LOSSES)
def test_traced_losses_are_saved_without_us(name):
    build, target = PORTABLE_LOSSES[name]
    loss, x, other = build(), torch.randn(5, 8), torch.randn(5, 8)
    traced = saved_trace(loss, x, target)
    assert "gdbp::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(other, target), loss(other, target))


@pytest.mark.parametrize("name", [*PORTABLE, *PORTABLE_LOSSES])
def test_onnx_sees_torchs_operators(name, monkeypatch):
    """torch.onnx.export itself needs packages; this is the program that it makes its own of."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    build, *target = PORTABLE_LOSSES[name] if name in PORTABLE_LOSSES else (PORTABLE[name],)
    module, x = build(), torch.randn(5, 8)
    program = torch.export.export(module, (x, *target))
    assert "gdbp" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x, *target), module(x, *target))


# ---- parametrizations, ties, copies ----


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight.triu() + weight.triu(1).T


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_parametrizations(way, activation):
    torch.manual_seed(2)
    mine = gdbp.nn.Linear(4, 4, activation=activation, dtype=DOUBLE)
    other = nn.Linear(4, 4, dtype=DOUBLE)
    other.load_state_dict(mine.state_dict())
    act = gdbp.reference.ACTIVATIONS[activation or "none"][0]
    x, results = torch.randn(5, 4, dtype=DOUBLE), []
    for layer in (mine, other):
        torch.manual_seed(3)
        WAYS[way](layer)
        y = layer(x) if layer is mine else act(layer(x))
        parameters = list(layer.parameters())
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)])
    torch.testing.assert_close(*results)
    assert isinstance(mine, gdbp.nn.Linear) and (activation is None or mine.activation in repr(mine))
    last = mine.eval()(x)
    parametrize.remove_parametrizations(mine, "weight")
    assert type(mine) is gdbp.nn.Linear
    torch.testing.assert_close(mine(x), last)


def test_tied_weights():
    """An autoencoder whose decoder is the transposed encoder, and two layers with one weight."""

    class Tied(nn.Module):
        def __init__(self, cls):
            super().__init__()
            self.first, self.second, self.third = (cls(4, 4, dtype=DOUBLE) for _ in range(3))
            self.second.weight = self.first.weight

        def forward(self, x):
            h = torch.tanh(self.second(torch.tanh(self.first(x))))
            return gdbp.nn.functional.linear(h, self.third.weight.T, activation="relu") @ self.third.weight

    plain = Tied(nn.Linear)
    ours = Tied(gdbp.nn.Linear)
    ours.load_state_dict(plain.state_dict())
    fused = gdbp.fuse(copy.deepcopy(plain))
    assert fused.second.weight is fused.first.weight and len(list(ours.parameters())) == 5
    x, results = torch.randn(5, 4, dtype=DOUBLE), []
    for model in (plain, ours, fused):
        optimizer = gdbp.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert model.second.weight is model.first.weight
        results.append(list(model.parameters()))
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_copies_train_on_their_own(batch_norm):
    model = gdbp.nn.MLP([3, 6, 2], "elu", batch_norm=batch_norm, dropout=0.1)
    x = torch.randn(8, 3)
    model(x)
    for copied in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        clone = copied(model)
        assert type(clone) is gdbp.nn.MLP and repr(clone) == repr(model)
        results = []
        for each in (model, clone):
            torch.manual_seed(4)
            results.append([each(x), *each.buffers()])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        clone(x).sum().backward()
        assert all(p.grad is None for p in model.parameters())
        model.load_state_dict(clone.state_dict())
