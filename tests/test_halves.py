"""Products of half types on processors without instructions for them, which are formed in float32."""

import pytest
import torch
import torch.nn.functional as F

import gdbp
from gdbp.nn.functional import linear, linear_cross_entropy
from tests.oracle import LAYOUTS, compare, laid_out, no_worse, ulps, values_and_grads
from tests.test_linear import ACTIVATIONS, SIZES, layer, ours, torchs

HALVES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", HALVES, ids=str)


@pytest.fixture(autouse=True)
def without_instructions():
    gdbp._C.allow_half_products(False)
    yield
    gdbp._C.allow_half_products(True)


def drawn(*shape, dtype):
    return torch.randn(shape).to(dtype)


@dtypes
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "tanh"])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes(activation, bias, dtype):
    for rows, n_in, n_out in SIZES:
        compare(ours(activation), torchs(activation), layer((rows,), n_in, n_out, dtype=dtype, bias=bias))


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4))
def test_layouts(dtype, layout, which):
    for lead in ((9,), (2, 3), (1,), ()):
        for n_in, n_out in ((17, 5), (1, 4), (3, 1)):
            *tensors, upstream = (t.detach().to(dtype) for t in (*layer(lead, n_in, n_out), torch.randn(*lead, n_out)))
            tensors = [*tensors, upstream]
            tensors[which] = laid_out(tensors[which], layout)
            *tensors, upstream = tensors
            compare(ours("relu"), torchs("relu"), [t.requires_grad_() for t in tensors], upstream)


@dtypes
@pytest.mark.parametrize(
    "sizes", [(2, 20000, 600), (5000, 3, 900), (300, 200, 257), (17000, 5, 70), (1030, 4100, 1040)], ids=str
)
def test_large_ones_in_parts(dtype, sizes):
    """Not all of which exists in float32 at once; and those for which a library's threads are worth it."""
    rows, n_in, n_out = sizes
    x, w, b = (t.detach().to(dtype) for t in layer((rows,), n_in, n_out))
    exact = F.linear(x.double(), w.double(), b.double())
    result, typical = linear(x, w, b), exact.square().mean().sqrt()
    # Rounded once. Float32's own error is seen where numbers cancel, or it carries one over a limit.
    assert ulps(result, exact, exact.abs().clamp(min=typical)) < 0.51
    assert (result == exact.to(dtype)).double().mean() > 0.98


@dtypes
def test_bias_is_added_before_the_rounding(dtype):
    x, w = torch.tensor([[256.0, 256.0]], dtype=dtype), torch.tensor([[256.0, 1.0]], dtype=dtype)
    bias = torch.tensor([-65000.0], dtype=dtype)
    assert linear(x, w, bias).item() == 65792 + bias.item()
    # Beyond float16's largest number in between, but not at the end.
    x, w = torch.full((1, 2), 200.0, dtype=dtype), torch.full((1, 2), 200.0, dtype=dtype)
    assert linear(x, w, torch.tensor([-60000.0], dtype=dtype)).item() == pytest.approx(20000, rel=0.01)
    assert torch.isinf(linear(x, w)).item() == (dtype is torch.float16)


@dtypes
def test_nonfinite(dtype):
    x = drawn(4, 5, dtype=dtype)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    w = drawn(3, 5, dtype=dtype)
    torch.testing.assert_close(linear(x, w), F.linear(x.double(), w.double()).to(dtype), equal_nan=True)


@dtypes
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_modules_and_autocast(dtype, activation):
    compiled = gdbp.nn.Linear(40, 30, activation=activation)
    x = torch.randn(50, 40, requires_grad=True)
    with torch.autocast("cpu", dtype):
        output = compiled(x)
    output.float().sum().backward()
    assert output.dtype is dtype and compiled.weight.grad.dtype is torch.float32

    def plain(x, w, b):
        return ACTIVATIONS[activation](F.linear(x, w, b))

    x, w, b = (t.detach().to(dtype).double() for t in (x, compiled.weight, compiled.bias))
    torch.testing.assert_close(output.double(), plain(x, w, b), rtol=0.02, atol=0.02)


@dtypes
@pytest.mark.parametrize("classes", [5, 2100])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy(dtype, classes, bias, monkeypatch):
    monkeypatch.setattr(gdbp.ops.linear_loss, "_PANEL", 24 * 500)
    x, w, b = (t.detach() for t in layer((70,), 24, classes, dtype=dtype))
    labels = torch.randint(classes, (70,))
    tensors = [t.requires_grad_() for t in (x, w / 4, b)[: 3 if bias else 2]]

    def mine(x, w, b=None):
        return linear_cross_entropy(x, w, labels, linear_bias=b, memory_budget=classes * 4 * 32)

    def plain(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b), labels)

    exact = values_and_grads(plain, [t.detach().double().requires_grad_() for t in tensors])
    torchs = values_and_grads(plain, [t.detach().clone().requires_grad_() for t in tensors])
    for triple in zip(values_and_grads(mine, tensors), torchs, exact, strict=True):
        no_worse(*triple)


def test_what_the_processor_has():
    assert not gdbp._C.has_products_of("bfloat16")
    gdbp._C.allow_half_products(True)
    for name, ask in (("bfloat16", "_is_mkldnn_bf16_supported"), ("float16", "_is_mkldnn_fp16_supported")):
        assert gdbp._C.has_products_of(name) == getattr(torch.ops.mkldnn, ask)()
    with pytest.raises(ValueError, match="dtype is 'float32'; expected bfloat16 or float16"):
        gdbp._C.has_products_of("float32")


@dtypes
def test_small_ones_where_it_has_instructions(dtype):
    gdbp._C.allow_half_products(True)
    for rows, n_in, n_out in ((1, 1, 1), (32, 64, 64), (63, 64, 65)):
        compare(ours("gelu"), torchs("gelu"), layer((rows,), n_in, n_out, dtype=dtype))
