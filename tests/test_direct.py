"""Calls that go straight to C++, graph and all: the same as through a Function of Python, and all that may hang on a
node of the graph."""

import gc
import pickle
import sys
import threading

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import gdbp
from gdbp.nn.functional import (
    batch_norm,
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    linear,
    linear_batch_norm,
    mse_loss,
    smooth_l1_loss,
)
from gdbp.ops import _function

pytestmark = pytest.mark.skipif(not gdbp._load.available, reason="what is tested is the compiled part")
LABELS = torch.tensor([0, 3, 2, 1, 0, 2])
SOFT = torch.rand(6, 4).softmax(1)


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (4, 5), (4,))
    return [torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def layer(activation):
    return lambda x, w, b: linear(x, w, b, activation=activation)


def loss(reduction="mean", target=LABELS, **options):
    def of(x, w, b):
        logits = linear(x, w, b)
        # A weight is as long as there are classes.
        chosen = {name: b.detach() ** 2 if value == "b" else value for name, value in options.items()}
        return cross_entropy(logits, target, reduction=reduction, **chosen)

    return of


def norm(training, activation, running=True):
    """The bias is an offset, which in training only moves the running mean."""

    def of(x, w, b):
        mean, variance = (b.detach() / 10, b.detach() ** 2 + 0.5) if running else (None, None)
        return linear_batch_norm(x, w, b, mean, variance, w.sum(1), w[:, 0], training, activation=activation)

    return of


def elements(of, **options):
    def call(x, w, b):
        y = linear(x, w, b)
        return of(y, (2 * y.detach()).sigmoid(), **options)

    return call


CALLS = {
    "batch norm": norm(True, "silu"),
    "batch norm, nothing running": norm(True, None, running=False),
    "batch norm, running": norm(False, "tanh"),
    **{str(name): layer(name) for name in (None, "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus")},
    "no bias": lambda x, w, b: linear(x, w, None, activation="elu"),
    "mean": loss(),
    "none": loss("none"),
    "sum, smooth, weighted": loss("sum", label_smoothing=0.1, weight="b"),
    "z, capped": loss(z_loss=0.01, softcap=5.0),
    "mixture": loss(target=(LABELS, LABELS.flip(0), 0.3)),
    "probabilities": loss(target=SOFT),
    "normalizer": loss(normalizer=7.0),
    "in place": loss(inplace_backward=True),
    "ignored": loss(ignore_index=2),
    "mse": elements(mse_loss),
    "huber, none": elements(huber_loss, reduction="none", delta=0.5),
    "smooth l1, sum": elements(smooth_l1_loss, reduction="sum", beta=0.5),
    "bce": elements(binary_cross_entropy_with_logits),
    "bce, weighted": elements(binary_cross_entropy_with_logits, weight=torch.rand(6, 1), pos_weight=torch.rand(4)),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@pytest.fixture
def through_functions(monkeypatch):
    def switch():
        for name in ("linear", "loss", "norm"):
            monkeypatch.setattr(sys.modules[f"gdbp.ops.{name}"], "is_direct", lambda *_: False)

    return switch


def gradients(call, inputs, **options):
    output = call(*inputs)
    upstream = torch.linspace(-1, 2, output.numel()).to(output.dtype).reshape(output.shape)
    return output, torch.autograd.grad(output, inputs, upstream, allow_unused=True, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@each_call
def test_equal_to_the_function(call, dtype, through_functions):
    inputs = tensors(dtype)
    assert _function.is_direct(*inputs)
    directly = gradients(call, inputs)
    through_functions()
    for here, there in zip(directly, gradients(call, inputs), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


@each_call
def test_only_the_gradients_asked_for(call):
    every = tensors()
    _, expected = gradients(call, every)
    for wanted in range(3):
        inputs = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(tensors())]
        output = call(*inputs)
        if not output.requires_grad:  # "no bias"
            continue
        upstream = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
        (found,) = torch.autograd.grad(output, inputs[wanted], upstream)
        torch.testing.assert_close(found, expected[wanted], rtol=0, atol=0)
    assert not call(*[t.detach() for t in every]).requires_grad
    with torch.no_grad():
        assert not call(*every).requires_grad


@each_call
def test_backward_twice(call):
    x, w, b = tensors()
    output = call(x, w, b).sum()
    if call is CALLS["in place"]:
        output.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()
        return
    output.backward(retain_graph=True)
    once = x.grad.clone()
    output.backward()
    torch.testing.assert_close(x.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize(
    "name",
    [
        *("relu", "gelu", "tanh", "mean", "none", "probabilities", "z, capped", "batch norm", "batch norm, running"),
        *("mse", "huber, none", "bce, weighted"),
    ],
)
def test_second_derivatives(name, through_functions):
    def second():
        inputs = tensors(torch.float64)
        _, first = gradients(CALLS[name], inputs, create_graph=True)
        total = sum((g * torch.linspace(-1, 1, g.numel()).to(g).view_as(g)).sum() for g in first if g is not None)
        return torch.autograd.grad(total, inputs, allow_unused=True)

    directly = second()
    through_functions()
    torch.testing.assert_close(directly, second())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(momentum, through_functions):
    def after():
        layer = gdbp.nn.BatchNorm1d(4, momentum=momentum, activation="relu")
        version = layer.running_mean._version
        for seed in range(3):
            layer(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))
        assert layer.running_mean._version > version
        return list(layer.buffers())

    directly = after()
    through_functions()
    for here, there in zip(directly, after(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def test_batch_norm_may_be_written_over():
    """It keeps its input alone."""
    x = torch.randn(6, 4, requires_grad=True)
    batch_norm(x, None, None, training=True, activation="relu").mul_(2).sum().backward()
    found, x.grad = x.grad, None
    (2 * batch_norm(x, None, None, training=True, activation="relu")).sum().backward()
    torch.testing.assert_close(found, x.grad)


@pytest.mark.parametrize("way", ["direct", "functions"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "in place"])
def test_tangent_of_an_upstream_gradient(name, way, through_functions):
    """Forward over backward, of a graph that was there before: the gradients are linear in the upstream one."""
    if way == "functions":
        through_functions()
    inputs = tensors(torch.float64)
    output = CALLS[name](*inputs)
    v = torch.linspace(0.5, 1, output.numel(), dtype=output.dtype).reshape(output.shape)

    def pull(v):
        found = torch.autograd.grad(output, inputs, v, retain_graph=True, allow_unused=True)
        return tuple(g for g in found if g is not None)

    wanted = pull(v)
    values, tangents = torch.func.jvp(pull, (v,), (v,))
    with forward_ad.dual_level():
        duals = [forward_ad.unpack_dual(g) for g in pull(forward_ad.make_dual(v, 2 * v))]
    for value, tangent, dual, gradient in zip(values, tangents, duals, wanted, strict=True):
        torch.testing.assert_close(value, gradient)
        torch.testing.assert_close(tangent, gradient)
        # That of an offset in training is 0, and constant.
        torch.testing.assert_close(torch.zeros_like(gradient) if dual.tangent is None else dual.tangent, 2 * gradient)


@pytest.mark.parametrize("of", [linear, batch_norm, loss()], ids=["linear", "batch norm", "loss"])
def test_what_is_not_read_may_change(of):
    """A bias is kept for second derivatives alone, and logits whose gradient was made along with the loss."""
    x, w, b = tensors()
    if of is linear:
        y, changed = linear(x, w, b, activation="relu"), b
    elif of is batch_norm:
        y, changed = batch_norm(x[:, :4], None, None, w.sum(1), b, True), b
    else:
        changed = linear(x, w, b)
        y = cross_entropy(changed, LABELS)
    wanted = torch.autograd.grad(y.sum(), (x, w), retain_graph=True)
    with torch.no_grad():
        changed.add_(1)
    for got, want in zip(torch.autograd.grad(y.sum(), (x, w), retain_graph=True), wanted, strict=True):
        assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), (x, w), create_graph=True)


def test_in_place_gradients_are_not_differentiated_again():
    inputs = tensors()
    output = CALLS["in place"](*inputs)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(output, inputs, create_graph=True)


def test_what_was_kept_must_not_change():
    x, w, b = tensors()
    for changed in (lambda y: w, lambda y: y):
        y = linear(x, w, b, activation="tanh")
        with torch.no_grad():
            changed(y).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    logits = torch.randn(6, 4, requires_grad=True)
    value = cross_entropy(logits * 1, LABELS, reduction="none")
    value.sum().backward()
    copy = logits * 1
    value = 2 * cross_entropy(copy, LABELS)
    copy.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@each_call
def test_hooks(call):
    inputs = tensors()
    _, plain = gradients(call, inputs)
    seen = []
    output = call(*inputs)
    node = output.grad_fn
    arguments = {"_LinearBackward": 3, "_BatchNormBackward": 4}
    assert len(node.next_functions) == arguments.get(node.name(), 2)
    node.register_prehook(lambda grads: tuple(2 * g for g in grads))
    node.register_hook(lambda grads, outputs: seen.append(len(grads)))
    upstream = torch.linspace(-1, 2, output.numel()).reshape(output.shape)
    doubled = torch.autograd.grad(output, inputs, upstream, allow_unused=True)
    assert seen == [len(node.next_functions)]
    torch.testing.assert_close(doubled, tuple(g if g is None else 2 * g for g in plain))


@each_call
def test_saved_tensors_can_be_put_away(call):
    inputs = tensors()
    expected = gradients(call, inputs)
    kept = []

    def pack(tensor):
        kept.append(tensor.dtype)
        return pickle.dumps(tensor.detach())

    if call is CALLS["in place"]:
        return
    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        found = gradients(call, inputs)
    assert kept
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    recomputed = gradients(lambda *i: torch.utils.checkpoint.checkpoint(call, *i, use_reentrant=False), inputs)
    torch.testing.assert_close(recomputed, expected, rtol=0, atol=0)


@each_call
def test_many_upstream_gradients_at_once(call):
    if call is CALLS["in place"]:
        return
    inputs = tensors()
    output = call(*inputs)
    upstream = torch.randn(3, *output.shape)
    together = torch.autograd.grad(output, inputs, upstream, True, is_grads_batched=True, allow_unused=True)
    for i in range(3):
        one = torch.autograd.grad(output, inputs, upstream[i], retain_graph=True, allow_unused=True)
        torch.testing.assert_close(tuple(g if g is None else g[i] for g in together), one, rtol=1e-5, atol=1e-6)


@each_call
def test_compiled_autograd(call):
    inputs = tensors()
    expected = gradients(call, inputs)
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        for _ in range(2):
            torch.testing.assert_close(gradients(call, inputs)[1], expected[1], rtol=1e-6, atol=1e-7)


KEEP_PRE = ("gelu", "gelu_tanh", "silu")


def allocated(run):
    """Bytes of the new tensors that `run` made, one beside the other."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())


@pytest.mark.parametrize("activation", KEEP_PRE)
def test_the_last_backward_pass_writes_over_what_was_kept(activation):
    """And no other: not while the graph is kept, while somebody has put the saved tensors away or holds them, or where
    one gradient stands for many."""
    inputs = [torch.randn(64, 8, requires_grad=True), torch.randn(512, 8, requires_grad=True), None]
    call, size = layer(activation), 64 * 512 * 4
    expected = torch.autograd.grad(call(*inputs).sum(), inputs[:2], create_graph=True)
    output, ones = call(*inputs), torch.ones(64, 512)
    kept = allocated(lambda: torch.autograd.grad(output, inputs[:2], ones, retain_graph=True))
    found = []
    over = allocated(lambda: found.extend(torch.autograd.grad(output, inputs[:2], ones)))
    assert kept - over == size
    torch.testing.assert_close(tuple(found), expected, rtol=1e-5, atol=1e-5)
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t.detach()) or t, lambda t: t):
        output = call(*inputs)
    before = [t.clone() for t in held]
    torch.testing.assert_close(torch.autograd.grad(output, inputs[:2], ones), expected, rtol=1e-5, atol=1e-5)
    assert all(map(torch.equal, held, before))
    output = call(*inputs)
    many = torch.autograd.grad(output, inputs[:2], ones.expand(3, -1, -1), is_grads_batched=True)
    torch.testing.assert_close(tuple(g[1] for g in many), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", KEEP_PRE)
def test_leading_dimensions_are_written_over_too(activation):
    x, w, b = torch.randn(2, 3, 5, requires_grad=True), *tensors()[1:]
    f = layer(activation)
    kept = torch.autograd.grad(f(x, w, b).sum(), (x, w, b), create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(f(x, w, b).sum(), (x, w, b)), kept)


def test_through_several_threads():
    x, w, b = tensors()
    output = linear(x, w, b, activation="gelu")
    value = cross_entropy(output, LABELS)
    (expected,) = torch.autograd.grad(value, x, retain_graph=True)
    found = []

    def go():
        for create in (False, True):
            found.append(torch.autograd.grad(value, x, retain_graph=True, create_graph=create)[0].detach())

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    for gradient in found:
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_a_deep_graph_goes_away_without_recursion():
    x = torch.randn(1, 2, requires_grad=True)
    w = torch.eye(2)
    y = x
    for _ in range(100_000):
        y = linear(y, w)
    del y
    gc.collect()


def test_an_undefined_gradient_passes():
    x, w, b = tensors()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    Nothing.apply(linear(x, w, b, activation="relu")).sum().backward()
    Nothing.apply(cross_entropy(linear(x, w, b), LABELS)).backward()
    assert x.grad is None or not x.grad.any()


class Loud(torch.Tensor):
    pass


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_who_listens_is_not_passed_by():
    x = torch.randn(2, 3)
    direct = []

    def ask(t):
        direct.append(_function.is_direct(x, t, None))
        return t.sum()

    for mode in (FunctionMode, DispatchMode, torch.autograd.forward_ad.dual_level):
        with mode():
            ask(x)
    torch.func.grad(ask)(x)
    torch.func.vmap(ask)(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    torch.fx.experimental.proxy_tensor.make_fx(ask)(x)
    for other in (x.as_subclass(Loud), x.to_sparse(), x.to("meta")):
        ask(other)
    assert not any(direct), direct
    assert _function.is_direct(x, torch.nn.Parameter(x), None)
    with torch.inference_mode():
        assert _function.is_direct(x)
        assert linear(torch.ones(1, 3), torch.ones(2, 3)).is_inference()


def test_anomaly_mode_names_the_forward_call():
    x, w, b = tensors()
    with torch.autograd.detect_anomaly(check_nan=True):
        y = linear(x, w, b, activation="silu")
        with (
            pytest.warns(UserWarning, match="_LinearBackward"),
            pytest.raises(RuntimeError, match=r"_LinearBackward.*nan"),
        ):
            y.backward(torch.full_like(y, float("nan")))
