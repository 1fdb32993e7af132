"""Narrow linear layers in a row, which a fused model computes together on the CPU: one node of the graph."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from torch import nn

import gdbp
from gdbp.fusion.run import strip
from gdbp.ops import mlp
from tests.test_fuse import kernels

pytestmark = pytest.mark.skipif(not gdbp._load.available, reason="what is tested is the compiled part")
ACTIVATIONS = (nn.ReLU, lambda: nn.ReLU(inplace=True), nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Softplus)


def nodes(y):
    """The names of the graph's nodes from here to the leaves."""
    found, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and "AccumulateGrad" not in node.name():
            found.append(node.name())
            todo += [following for following, _ in node.next_functions]
    return found


def results(model, x, upstream):
    x = x.clone().requires_grad_()
    y = model(x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *parameters], upstream)]


def nudged(model):
    """A copy whose parameters are half an ulp of float64 off."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + torch.finfo(p.dtype).eps / 2 * torch.randn_like(p).sign())
    return model


def check(model, x):
    """A fused copy against the model in float64; returns the copy's result. With batch norm, what half an ulp of the
    weights makes of a number is added to its bound: few rows magnify that by hundreds, and float64 is its own oracle.
    """
    fused = gdbp.fuse(copy.deepcopy(model))
    y = fused(x)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=x.dtype).view_as(y)
    found = results(fused, x, upstream)
    exact = results(copy.deepcopy(model).double(), x.double(), upstream.double())
    has_norm = any(isinstance(module, nn.BatchNorm1d) for module in model.modules())
    near = results(nudged(model), x.double(), upstream.double()) if has_norm else exact
    for ours, wanted, moved in zip(found, exact, near, strict=True):
        assert ours.dtype is x.dtype and ours.shape == wanted.shape
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        tolerance = (2e-5 if x.dtype is torch.float32 else 1e-13) * scale
        tolerance += (moved - wanted).abs().max().item() if wanted.numel() else 0
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=tolerance)
    return found[0]


@pytest.mark.parametrize("seed", range(100))
def test_random_sequences(seed):
    pick = random.Random(seed)
    torch.manual_seed(seed)
    dtype = pick.choice((torch.float32, torch.float64))
    sizes = [pick.choice((1, 3, 16, 17, 64, 127, 128, 129)) for _ in range(pick.randint(3, 7))]
    layers = []
    for inputs, outputs in pairwise(sizes):
        if pick.random() < 0.3:
            name = pick.choice((None, "relu", "gelu", "softplus", "leaky_relu"))
            layers.append(gdbp.nn.Linear(inputs, outputs, bias=pick.random() < 0.8, activation=name))
        else:
            layers.append(nn.Linear(inputs, outputs, bias=pick.random() < 0.8))
            layers += [pick.choice(ACTIVATIONS)()] if pick.random() < 0.7 else []
        if pick.random() < 0.15:
            # Batch norm of few rows makes more of a rounding.
            norms = [nn.BatchNorm1d(outputs)] if dtype is torch.float64 else []
            layers.append(pick.choice([nn.Identity(), nn.Hardtanh(), *norms]))
    model = nn.Sequential(*layers).to(dtype)
    if pick.random() < 0.3:
        pick.choice(list(model.parameters())).requires_grad_(False)
    check(model, torch.randn(pick.choice((2, 5, 130)), sizes[0], dtype=dtype))


class Attributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.first = nn.Linear(200, 60), nn.Linear(60, 50)
        self.second, self.norm = nn.Linear(50, 40), nn.BatchNorm1d(30)
        self.third, self.act, self.head = nn.Linear(40, 30), nn.SiLU(), nn.Linear(30, 10)

    def forward(self, x):
        x = torch.relu(self.wide(x))
        x = torch.nn.functional.gelu(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(self.act(self.norm(self.third(x))))


class Tail(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(20, 30), nn.Linear(30, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


class Skip(Tail):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        again = torch.relu(self.second(hidden))
        return self.head(again + x) + hidden.sum()


def test_attributes():
    y = check(Tail(), torch.randn(7, 20))
    assert nodes(y) == ["_MLPBackward"]
    y = check(Attributes(), torch.randn(7, 200))
    assert nodes(y).count("_MLPBackward") == 1 and nodes(y).count("_LinearBackward") == 1
    # What is used twice, or not by the next layer alone, must exist.
    assert "_MLPBackward" not in nodes(check(Skip(), torch.randn(7, 20)))


def test_sequence_is_one_node():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20), nn.GELU(), nn.Linear(20, 5), nn.Tanh())
    y = check(model, torch.randn(7, 20))
    assert nodes(y) == ["_MLPBackward"]
    assert nodes(check(model, torch.randn(2, 3, 20))) == ["_MLPBackward"]
    assert kernels(gdbp.fuse(model).eval(), torch.randn(3, 20)) == ["gdbp::mlp_rows"]


def test_one_layer_is_none():
    for layers in ([nn.Linear(4, 3), nn.ReLU()], [nn.ReLU()], [nn.Linear(4, 200), nn.Linear(200, 3)], []):
        assert strip(layers, 0) is None
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()]
    assert strip(layers, 0) is None
    layers = [nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3)]
    assert strip(layers, 0).length == 3 and strip(layers, 0).activations == ("relu", "none")


def test_a_layer_with_a_hook_is_called():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    fused, x = gdbp.fuse(copy.deepcopy(model)), torch.randn(3, 4)
    seen = []
    handle = fused[2].register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(fused(x), model(x))
    assert len(seen) == 1 and "_MLPBackward" not in nodes(fused(x))
    handle.remove()
    assert nodes(fused(x)) == ["_MLPBackward"]


def test_observers_see_every_layer():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(9, 4)
    fused = gdbp.fuse(model)
    with gdbp.nn.utils.collect_activation_stats(fused) as activity:
        y = fused(x)
    assert [layer.name for layer in activity.stats().layers] == ["0 + 1", "2 + 3"]
    assert "_MLPBackward" not in nodes(y)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU])
def test_outputs_written_over(activation):
    """As behind torch's own activations: refused where the derivative reads the output."""
    layers = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), activation()]
    model = nn.Sequential(*layers)
    fused, x = gdbp.fuse(copy.deepcopy(model)), torch.randn(6, 4)
    outcomes = []
    for each in (model, fused):
        y = each(x)
        y.add_(1)
        try:
            y.square().sum().backward()
            outcomes.append([p.grad for p in each.parameters()])
        except RuntimeError as error:
            outcomes.append(type(error))
            assert "modified by an inplace operation" in str(error)
    if isinstance(outcomes[0], list):
        for ours, wanted in zip(outcomes[1], outcomes[0], strict=True):
            torch.testing.assert_close(ours, wanted)
    else:
        assert outcomes[0] is outcomes[1]


def test_written_over_by_the_next_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.LeakyReLU(), nn.Hardtanh(inplace=True))
    check(model, torch.randn(6, 4))
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), nn.Hardtanh(inplace=True), nn.Linear(3, 2))
    check(model, torch.randn(6, 4))


def test_what_the_kernels_do_not_take():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2))
    fused, x = gdbp.fuse(copy.deepcopy(model)), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype is torch.bfloat16
    half = copy.deepcopy(fused).bfloat16()
    assert half(x.bfloat16()).dtype is torch.bfloat16 and "_MLPBackward" not in nodes(half(x.bfloat16()))
    torch.testing.assert_close(torch.func.vmap(fused)(x), model(x))
    jacobian = torch.func.jacrev(fused)(x[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(model, x[0]))
    torch.testing.assert_close(fused(torch.randn(0, 4)), torch.empty(0, 2))
    with pytest.raises(RuntimeError, match=r"input has shape \[3, 5\]"):
        fused(torch.randn(3, 5))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x))


def test_tied_layers():
    layer = nn.Linear(8, 8)
    check(nn.Sequential(layer, nn.Tanh(), layer, nn.ReLU(), layer), torch.randn(5, 8))


def test_explain_and_report():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 2))
    fused = gdbp.fuse(model)
    (call,) = gdbp.explain(fused, torch.randn(3, 4)).calls
    assert call.layers == ("0", "1", "2", "3", "4") and call.kernel == "gdbp.mlp_rows (cpu)" and not call.why
    (call,) = gdbp.explain(gdbp.nn.MLP([4, 5, 6]), torch.randn(3, 4)).calls
    assert call.layers == ("(itself)",) and call.kernel == "gdbp.mlp_rows (cpu)"
    # Runs that are computed one after the other have a row each.
    wide = gdbp.fuse(nn.Sequential(nn.Linear(4, 200), nn.ReLU(), nn.Linear(200, 6), nn.GELU()))
    calls = gdbp.explain(wide, torch.randn(3, 4)).calls
    assert [call.layers for call in calls] == [("0", "1"), ("2", "3")]
    assert [call.kernel for call in calls] == ["gdbp.linear (cpu)", "gdbp.linear_with_pre (cpu)"]


def test_more_layers_than_the_kernels_take():
    layers = [layer for _ in range(40) for layer in (nn.Linear(6, 6), nn.Tanh())]
    y = check(nn.Sequential(*layers), torch.randn(4, 6))
    assert mlp.MOST_WIDE == 128 and nodes(y) == ["_MLPBackward"] * -(-40 // mlp.MOST_LAYERS)
