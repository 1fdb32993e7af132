"""What surrounds the kernels of whole networks (``gdbp.ops.mlp``), on a CPU, where float64 stands in for them: which
calls take them, what autograd gets, and what it gets where they are not taken. The kernels themselves are tested in
cudasim and in test_train_step_cuda.py."""

import copy

import pytest
import torch

import gdbp
from gdbp import reference
from gdbp.nn import MLP
from gdbp.ops import mlp

SIZES = (7, 12, 9, 3)


def layers(x, weights, biases, activation):
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = torch.nn.functional.linear(x, w, b)
        x = reference.ACTIVATIONS[activation][0](x) if i + 1 < len(weights) else x
    return x


class Kernels:
    """In the place of the operators, and counting their calls."""

    def __init__(self):
        self.calls: list[str] = []
        self.fits = True

    def mlp_fits(self, input, weights, biases, activation, factors, trains):
        return self.fits

    def mlp(self, input, weights, biases, activation, factors):
        self.calls.append("forward")
        wide = [[None if t is None else t.double() for t in ts] for ts in (weights, biases)]
        return layers(input.double(), *wide, activation).to(getattr(torch, factors, torch.float32))

    def mlp_backward(self, grad_output, input, weights, biases, activation, factors, mask):
        self.calls.append("backward")
        assert grad_output.dtype is getattr(torch, factors, torch.float32)
        with torch.enable_grad():
            given = [input, *(t for pair in zip(weights, biases, strict=True) for t in pair)]
            x, *parameters = (None if t is None else t.detach().double().requires_grad_() for t in given)
            y = layers(x, parameters[::2], parameters[1::2], activation)
            wanted = [t for t, m in zip((x, *parameters), mask, strict=True) if m]
            grads = list(torch.autograd.grad(y, wanted, grad_output.double())) if wanted else []
        grad_input = grads.pop(0).to(input.dtype) if mask[0] else None
        flat = torch.cat([g.flatten() for g in grads]) if grads else torch.empty(0)
        return grad_input, flat.float()


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    kernels = Kernels()
    library = torch.library.Library("gdbp", "IMPL", "CPU")
    for name in ("mlp", "mlp_backward", "mlp_fits"):
        library.impl(name, getattr(kernels, name))
    monkeypatch.setattr(mlp, "is_on_cpu", lambda input: False)
    yield kernels
    library._destroy()


def gradients(model, x, through_layers=False):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = torch.nn.Sequential.forward(model, x) if through_layers else model(x)
    (y * torch.arange(1.0, y.numel() + 1).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (2, 3, 7), (7,), (0, 7)])
@pytest.mark.parametrize("activation", ["relu", "gelu", None])
def test_gradients(activation, shape, kernels):
    model, x = MLP(SIZES, activation), torch.randn(shape)
    for ours, wanted in zip(gradients(model, x), gradients(model, x, True), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)
    assert kernels.calls == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, kernels):
    model, x = MLP(SIZES, dtype=dtype), torch.randn(5, 7, dtype=dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double(), True)
    for ours, wanted in zip(gradients(model, x), exact, strict=True):
        assert ours.dtype is dtype
        torch.testing.assert_close(ours.double(), wanted, rtol=0.02, atol=0.1)
    assert kernels.calls == ["forward", "backward"]


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (5,), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("of_input", [False, True])
def test_only_what_is_asked_for(frozen, of_input, kernels):
    model, x = MLP(SIZES), torch.randn(5, 7, requires_grad=of_input)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i not in frozen)
    y = model(x)
    assert y.requires_grad == (of_input or len(frozen) < 6)
    if not y.requires_grad:
        assert kernels.calls == ["forward"]
        return
    y.sum().backward()
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    others = torch.autograd.grad(torch.nn.Sequential.forward(model, x).sum(), wanted)
    for t, other in zip(wanted, others, strict=True):
        torch.testing.assert_close(t.grad, other)
    assert all(t.grad is None for t in (x, *model.parameters()) if not t.requires_grad)
    assert kernels.calls == ["forward", "backward"]


def test_without_gradients_nothing_is_recorded(kernels):
    model = MLP(SIZES)
    with torch.no_grad():
        assert not model(torch.randn(5, 7)).requires_grad
    assert kernels.calls == ["forward"]


def test_second_derivatives_are_those_of_the_layers(kernels):
    model, x = MLP(SIZES, "silu"), torch.randn(5, 7)
    results = []
    for forward in (model, lambda x: torch.nn.Sequential.forward(model, x)):
        x = x.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(forward(x).sin().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [x, *model[0].parameters(), *model[1].parameters()]))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert kernels.calls == ["forward", "backward"]  # of the output, on which the slope depends


def test_many_gradients_at_once(kernels):
    model, x = MLP(SIZES, "tanh"), torch.randn(7)
    ours = torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.testing.assert_close(ours, torch.autograd.functional.jacobian(model, x))
    assert kernels.calls.count("backward") == SIZES[-1]  # the second time


def test_transforms_take_the_layers(kernels):
    model, x = MLP(SIZES, "tanh"), torch.randn(4, 7)
    torch.func.vmap(torch.func.jacrev(model))(x)
    torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert kernels.calls == []


def test_retained_graph_and_changed_input(kernels):
    model, x = MLP(SIZES), torch.randn(5, 7)
    y = model(x)
    y.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    y.sum().backward()
    assert all(torch.equal(p.grad, 2 * f) for p, f in zip(model.parameters(), first, strict=True))
    y = model(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


CHANGES = {
    "hook": lambda model: model[1].register_forward_hook(lambda *_: None),
    "backward hook": lambda model: model[1].register_full_backward_hook(lambda *_: None),
    "forward": lambda model: setattr(model[1], "forward", lambda x: x[:, :9]),
    "activation": lambda model: setattr(model[0], "activation", "tanh"),
    "dropout": lambda model: model.insert(1, torch.nn.Dropout()),
    "appended": lambda model: model.append(torch.nn.Linear(3, 3)),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_others_take_the_layers(name, kernels):
    model = MLP(SIZES)
    CHANGES[name](model)
    model(torch.randn(5, 7, dtype=model[0].weight.dtype)).sum().backward()
    assert kernels.calls == []


def test_input_of_other_dtypes_under_autocast_takes_the_layers(kernels, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    weights, biases = [torch.randn(3, 7)], [None]
    for dtype, taken in ((torch.float64, False), (torch.int64, False), (torch.float32, True), (torch.float16, True)):
        output = mlp.forward(torch.ones(5, 7, dtype=dtype), weights, biases, "relu")
        assert (output is not None and output.dtype is torch.bfloat16) is taken
    assert kernels.calls == ["forward"] * 2


def test_too_large_ones_take_the_layers(kernels):
    kernels.fits = False
    MLP(SIZES)(torch.randn(5, 7)).sum().backward()
    kernels.fits = True
    with torch.no_grad():
        MLP((7, 3))(torch.randn(mlp.MOST_ROWS + 1, 7))
        assert kernels.calls == []
        MLP((7, 3))(torch.randn(mlp.MOST_ROWS, 7))
        assert kernels.calls == ["forward"]
        for dtype in (torch.bfloat16, torch.float16):
            MLP((7, 3), dtype=dtype)(torch.ones(mlp.MOST_ROWS + 1, 7, dtype=dtype))
        assert kernels.calls == ["forward"] * 3
    model = MLP((7, 3), dtype=torch.bfloat16)
    model(torch.ones(mlp.MOST_ROWS + 1, 7, dtype=torch.bfloat16)).sum().backward()
    assert kernels.calls == ["forward"] * 3


def test_whoever_watches_sees_the_layers(kernels):
    model = MLP(SIZES)
    with gdbp.nn.utils.collect_activation_stats(model) as activity:
        model(torch.randn(5, 7))
    assert len(activity.stats().layers) == 3 and kernels.calls == []


def test_training_goes_where_that_of_the_layers_goes(kernels):
    torch.manual_seed(0)
    model, x, y = MLP(SIZES), torch.randn(64, 7), torch.randint(3, (64,))
    twin = copy.deepcopy(model)
    twin.register_forward_hook(lambda *_: None)
    hooks = [layer.register_forward_hook(lambda *_: None) for layer in twin]
    losses = []
    for m in (model, twin):
        optimizer = gdbp.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(m(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(hooks) == 3
    assert kernels.calls.count("backward") == 20
