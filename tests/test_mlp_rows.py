"""``MLP`` on the CPU, where a network of narrow layers is one node of the graph (csrc/nodes/mlp.cpp,
csrc/mlp/mlp_cpu.cpp): its values and gradients against those of the layers in float64, and all that may be done with
a node."""

import copy
import random
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gdbp
from gdbp.nn import MLP
from gdbp.ops import mlp
from tests.test_train_step_narrow import ACTIVATIONS, ROWS, WIDTHS

pytestmark = pytest.mark.skipif(not gdbp._load.available, reason="what is tested is the compiled part")
SIZES = (7, 12, 9, 3)


def by_layers(model, x):
    return torch.nn.Sequential.forward(model, x)


def is_one_node(y):
    return y.grad_fn is not None and y.grad_fn.name() == "_MLPBackward"


def gradients(forward, model, x, **options):
    wanted = [t for t in (x, *model.parameters()) if t.requires_grad]
    y = forward(model, x)
    upstream = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    return [y, *torch.autograd.grad(y, wanted, upstream, **options)] if wanted else [y]


@pytest.mark.parametrize("seed", range(150))
def test_random_networks(seed):
    """Against layers in float64: a float32 sum may be off by some roundings of its largest terms."""
    pick = random.Random(seed)
    torch.manual_seed(seed)
    sizes = [pick.choice(WIDTHS[:-1]) for _ in range(pick.randint(2, 6))]
    dtype = pick.choice([torch.float32, torch.float64])
    model = MLP(sizes, pick.choice(ACTIVATIONS), dtype=dtype)
    for inputs, outputs, layer in zip(sizes, sizes[1:], model):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outputs, inputs) / inputs**0.5)
            layer.bias.normal_()
        if pick.random() < 0.2:
            layer.bias = None
        layer.requires_grad_(pick.random() < 0.8)
    lead = pick.choice([(), (pick.choice(ROWS),), (2, 3), (3, 0)])
    x = torch.randn(*lead, sizes[0], dtype=dtype, requires_grad=pick.random() < 0.5)
    if pick.random() < 0.3 and lead:
        x = torch.randn(*lead, 2 * sizes[0], dtype=dtype)[..., ::2].requires_grad_(x.requires_grad)
    found = gradients(lambda m, x: m(x), model, x)
    assert is_one_node(found[0]) == found[0].requires_grad
    wide = copy.deepcopy(model).double()
    exact = gradients(by_layers, wide, x.detach().double().requires_grad_(x.requires_grad))
    for ours, wanted in zip(found, exact, strict=True):
        assert ours.dtype is dtype and ours.shape == wanted.shape
        scale = max(1.0, wanted.abs().max().item()) if wanted.numel() else 1.0
        tolerance = (2e-5 if dtype is torch.float32 else 1e-13) * scale
        torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    torch.manual_seed(0)
    model = MLP([3, 5, 4, 2], activation, dtype=torch.float64)
    tensors = [torch.randn(6, 3, dtype=torch.float64, requires_grad=True), *model.parameters()]

    def call(x, *parameters):
        layers = list(pairwise([*parameters, None]))[::2]
        y = gdbp._C.mlp(x, [w for w, _ in layers], [b for _, b in layers], mlp.of_hidden(activation or "none", 3))
        assert is_one_node(y)
        return y

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


def test_derivatives_of_higher_order():
    model = MLP(SIZES, "tanh", dtype=torch.float64)
    results = []
    for forward in (lambda m, x: m(x), by_layers):
        x = torch.linspace(-1, 1, 35, dtype=torch.float64).view(5, 7).requires_grad_()
        (slope,) = torch.autograd.grad(forward(model, x).sin().sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(curve.square().sum(), [x, *model[0].parameters(), model[1].weight]))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_many_gradients_at_once_and_transforms():
    model, x = MLP(SIZES, "gelu", dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    wanted = torch.autograd.functional.jacobian(lambda x: by_layers(model, x), x)
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, x, vectorize=True), wanted)
    torch.testing.assert_close(torch.func.jacrev(model)(x), wanted)
    torch.testing.assert_close(torch.func.vmap(model)(x[None]), model(x[None]))
    _, slope = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, wanted.sum(1))


def test_retained_graph_and_changed_tensors():
    model, x = MLP(SIZES, "silu"), torch.randn(5, 7)
    y = model(x)
    y.sum().backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    y.sum().backward()
    assert all(torch.equal(p.grad, 2 * f) for p, f in zip(model.parameters(), first, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()
    for changed in (x, model[1].weight):
        y = model(x)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_gradients_are_nobody_elses():
    """Each has memory of its own, which whoever reads it may write to."""
    model, x = MLP(SIZES), torch.randn(300, 7, requires_grad=True)
    model(x).sum().backward()
    tensors = [x, *model.parameters()]
    assert len({t.grad.untyped_storage().data_ptr() for t in tensors}) == len(tensors)
    assert all(t.grad.untyped_storage().nbytes() == t.grad.nbytes for t in tensors)


def test_saved_tensors_pass_through_hooks():
    model, x = MLP(SIZES), torch.randn(5, 7)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = model(x)
    assert len(packed) == 8  # input, parameters, and what was kept
    expected = gradients(by_layers, model, x)[1:]
    for ours, wanted in zip(torch.autograd.grad(y.sum(), list(model.parameters())), expected, strict=True):
        assert ours.shape == wanted.shape


def test_checkpoint():
    model, x = MLP(SIZES, "gelu"), torch.randn(5, 7)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for reentrant in (False, True):
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)
        model.zero_grad()
        y.square().sum().backward()
        assert all(torch.equal(p.grad, w) for p, w in zip(model.parameters(), wanted, strict=True))


@pytest.mark.parametrize("rows", [3, 700, 5000])
def test_any_number_of_threads(rows):
    model, x, found = MLP([13, 64, 64, 5], "gelu"), torch.randn(rows, 13, requires_grad=True), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(lambda m, x: m(x), model, x))
    finally:
        torch.set_num_threads(2)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


CHANGES = {
    "hook": lambda model: model[1].register_forward_hook(lambda *_: None),
    "forward": lambda model: setattr(model[1], "forward", lambda x: x[:, :9]),
    "activation": lambda model: setattr(model[0], "activation", "tanh"),
    "dropout": lambda model: model.insert(1, torch.nn.Dropout()),
    "appended": lambda model: model.append(torch.nn.Linear(3, 3)),
    "bfloat16": lambda model: model.bfloat16(),
    "strided weight": lambda model: setattr(model[1], "weight", torch.nn.Parameter(torch.randn(12, 9).t())),
    "parametrized": lambda model: torch.nn.utils.parametrizations.weight_norm(model[1]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_others_take_the_layers(name):
    model = MLP(SIZES)
    CHANGES[name](model)
    y = model(torch.randn(5, 7, dtype=model[0].weight.dtype))
    assert not is_one_node(y)
    y.sum().backward()


def test_wide_ones_take_the_layers():
    for sizes in ([129, 4, 2], [4, 129, 2], [4, 2, 129], [2] * 18):
        assert not is_one_node(MLP(sizes)(torch.randn(3, sizes[0])))
    assert is_one_node(MLP([128, 128, 128])(torch.randn(3, 128)))


def test_autocast_takes_the_layers():
    model = MLP(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(5, 7))
    assert y.dtype is torch.bfloat16 and not is_one_node(y)


def test_mismatches_raise_what_the_layers_raise():
    model = MLP(SIZES)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|expected"):
        model(torch.randn(5, 8))
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(5, 7, dtype=torch.float64))


def test_tied_layers():
    model = MLP([6, 6, 6, 6], "tanh", dtype=torch.float64)
    model[1].weight = model[0].weight
    x = torch.randn(4, 6, dtype=torch.float64)
    ours, wanted = (gradients(f, model, x) for f in (lambda m, x: m(x), by_layers))
    assert is_one_node(ours[0]) and len(ours) == 6
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b)


def twice(model, x):
    return model(model(x))


def derived(model, x):
    return torch.func.functional_call(model, {"1.weight": model[0].weight.sin()}, (x,))


@pytest.mark.parametrize("call", [twice, derived])
def test_second_order_where_tensors_depend_on_each_other(call):
    """A network behind itself with one weight in two places, and a weight that is made of another."""
    model = MLP([6, 6, 6], "tanh", dtype=torch.float64)
    if call is twice:
        model[1].weight = model[0].weight
    parameters, x = list(model.parameters()), torch.randn(4, 6, dtype=torch.float64)
    many = torch.randn(3, 4, 6, dtype=torch.float64)
    results = []
    for each in (model, torch.nn.Sequential(*model)):
        first = torch.autograd.grad(call(each, x).sin().sum(), parameters, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters, materialize_grads=True)
        batch = torch.autograd.grad(call(each, x), parameters, many, is_grads_batched=True, materialize_grads=True)
        results.append([*first, *second, *batch])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_hooks_run_once():
    model, x = MLP(SIZES, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    calls = []
    for tensor in (x, *model.parameters()):
        tensor.register_hook(lambda g: calls.append(1) or 2 * g)
    model(x).square().sum().backward()
    plain = [t.grad for t in (x, *model.parameters())]
    count = len(calls)
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward(create_graph=True)
    assert len(calls) == 2 * count == 2 * len(plain)
    for ours, wanted in zip((x, *model.parameters()), plain, strict=True):
        torch.testing.assert_close(ours.grad.detach(), wanted)


def test_infinities_and_nan_stay_in_their_rows():
    model, x = MLP([13, 19, 5], "gelu"), torch.randn(40, 13)
    x[7, 3], x[20, 1] = float("nan"), float("inf")
    y, wanted = model(x), by_layers(model, x)
    torch.testing.assert_close(y, wanted, equal_nan=True)
    assert y[[i for i in range(40) if i not in (7, 20)]].isfinite().all()


@pytest.mark.parametrize("activations", ["relu gelu none", "gelu none tanh", "elu sigmoid silu"])
def test_opcheck(activations):
    model, activations = MLP(SIZES), activations.split()
    weights, biases = [m.weight.detach() for m in model], [m.bias.detach() for m in model]
    biases[1] = None
    for lead in ((4,), (), (2, 0)):
        x = torch.randn(*lead, 7)
        torch.library.opcheck(torch.ops.gdbp.mlp_rows, (x, weights, biases, activations, False))
        torch.library.opcheck(torch.ops.gdbp.mlp_rows, (x, weights, biases, activations, True))
        y, kept = torch.ops.gdbp.mlp_rows(x, weights, biases, activations, True)
        for mask in ([True] * 3 + [True, False] + [True] * 2, [False] * 6 + [True]):
            arguments = (torch.randn_like(y), x, kept, y, weights, activations, mask)
            torch.library.opcheck(torch.ops.gdbp.mlp_rows_backward, arguments)


def test_bad_arguments_of_the_operators():
    model, ops = MLP(SIZES), torch.ops.gdbp
    weights, biases = [m.weight.detach() for m in model], [m.bias.detach() for m in model]
    x, names = torch.randn(4, 7), ["relu", "relu", "none"]
    y, kept = ops.mlp_rows(x, weights, biases, names, True)
    with pytest.raises(TypeError, match="expected float32 or float64"):
        ops.mlp_rows(x.half(), [w.half() for w in weights], [b.half() for b in biases], names, True)
    with pytest.raises(RuntimeError, match=r"input has dtype Double and a weight has Float"):
        ops.mlp_rows(x.double(), weights, biases, names, True)
    with pytest.raises(ValueError, match=r"expected \(\*, 7\)"):
        ops.mlp_rows(x[:, :5], weights, biases, names, True)
    with pytest.raises(ValueError, match=r"grad_output has shape \[4, 3\] and kept \[3\]"):
        ops.mlp_rows_backward(y, x, kept[:3], None, weights, names, [True] * 7)
    with pytest.raises(ValueError, match="mask has 2 elements"):
        ops.mlp_rows_backward(y, x, kept, None, weights, names, [True] * 2)
    with pytest.raises(ValueError, match="got 2 activations and 3 weights"):
        ops.mlp_rows(x, weights, biases, names[:2], True)
    with pytest.raises(ValueError, match="activation is 'tan'; expected one of none, "):
        ops.mlp_rows(x, weights, biases, ["tan", *names[:2]], True)
    with pytest.raises(ValueError, match="output is missing or does not fit"):
        ops.mlp_rows_backward(y, x, kept, None, weights, ["relu"] * 3, [True] * 7)


def test_compiled_autograd():
    model, x = MLP(SIZES, "gelu"), torch.randn(5, 7)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    y = model(x)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.square().sum().backward()
    for p, w in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, w)


def test_training_goes_where_that_of_the_layers_goes():
    torch.manual_seed(0)
    model, x, y = MLP(SIZES), torch.randn(640, 7), torch.randint(3, (640,))
    twin, losses = copy.deepcopy(model), []
    for m, forward in ((model, lambda x: model(x)), (twin, lambda x: by_layers(twin, x))):
        optimizer = gdbp.optim.AdamW(m.parameters(), lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_the_compiled_part_the_layers_run(monkeypatch):
    monkeypatch.setattr(mlp, "is_taken", lambda input: False)
    assert not is_one_node(MLP(SIZES)(torch.randn(5, 7)))
