"""fuse and unfuse: the same numbers from fewer passes, and nothing else about the model changed."""

import copy
import io
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gdbp
from gdbp.nn._observe import observers
from tests.fuse_models import MODELS, Functional, Shared, Tower, fused, reasons

DOUBLE = torch.float64


def trained(model, x, steps=2):
    """Outputs, gradients, parameters and buffers along a short training, and what comes of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        seen += [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    training = model.training
    seen += [*(t.clone() for t in model.state_dict().values()), model.eval()(x).detach()]
    model.train(training)
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_training(name, dtype):
    build, shape, expected = MODELS[name]
    plain = build().to(dtype)
    model = copy.deepcopy(plain)
    before = list(model.named_parameters())
    keys = list(model.state_dict())
    model, report = fused(model)
    assert [(run.layers, run.kind) for run in report.fused] == expected
    after = list(model.named_parameters())
    assert [n for n, _ in before] == [n for n, _ in after] and all(a is b for (_, a), (_, b) in zip(before, after))
    assert list(model.state_dict()) == keys
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    torch.testing.assert_close(trained(model, x), trained(plain, x))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(name, dtype):
    """Outputs alone: in a training of a few rows each rounding is felt, and torch's are others."""
    build, shape, _ = MODELS[name]
    exact = build().double()
    plain = copy.deepcopy(exact).to(dtype)
    model, x = gdbp.fuse(copy.deepcopy(plain)), torch.randn(64, *shape[1:], dtype=torch.float64)
    for training in (True, False):
        y, other, right = (m.train(training)(x.to(next(m.parameters()).dtype)) for m in (model, plain, exact))
        assert y.dtype is other.dtype is dtype
        off, torchs_off = ((t.double() - right).abs().max() for t in (y, other))
        assert off <= 2 * torchs_off + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", MODELS)
def test_unfuse_is_exact(name):
    model = MODELS[name][0]()
    before = {n: (m, type(m), dict(vars(m))) for n, m in model.named_modules()}
    text = repr(model)
    gdbp.fuse(gdbp.fuse(model))
    assert repr(model) != text and "fused: " in repr(model)
    assert isinstance(model, before[""][1])
    assert gdbp.unfuse(model) is model and repr(model) == text
    after = {n: (m, type(m), dict(vars(m))) for n, m in model.named_modules()}
    assert list(before) == list(after)
    for n in before:
        assert before[n][0] is after[n][0] and before[n][1] is after[n][1]
        assert before[n][2].keys() == after[n][2].keys()
        assert all(before[n][2][key] is after[n][2][key] for key in before[n][2])
    gdbp.unfuse(model)


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_files(name):
    build, shape, _ = MODELS[name]
    model = gdbp.fuse(build())
    x = torch.randn(shape)
    model(x)
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    clones = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)
    for clone in (*clones, copy.copy(model)):
        assert type(clone) is type(model) and torch.equal(clone(x), model(x)) and repr(clone) == repr(model)
        assert type(gdbp.unfuse(clone)) is type(build())
    for clone in clones:
        assert clone(x).isfinite().all() and next(clone.parameters()) is not next(model.parameters())
    # A checkpoint fits before and after, either way.
    other = build().eval()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    model.load_state_dict(build().state_dict())


@pytest.mark.parametrize("name", MODELS)
def test_compile_and_export(name):
    torch._dynamo.reset()
    build, shape, _ = MODELS[name]
    model = gdbp.fuse(build())
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    for _ in range(2):
        a, b = model(x), compiled(x)
        # Not the same bits: narrow layers that are compiled come one by one.
        torch.testing.assert_close(a, b)
    a.sum().backward(), b.sum().backward()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    exported = torch.export.export(model.eval(), (x,)).module()
    # Layers that are called twice get another forward from torch.export, so they are called one by one.
    torch.testing.assert_close(exported(x), model(x))


def kernels(model, *args):
    """The operators of ours that a call runs."""
    with torch.profiler.profile() as profile:
        model(*args)
    return [event.name for event in profile.events() if event.name.startswith("gdbp::")]


def test_linear_and_batch_norm_share_their_passes():
    model = gdbp.fuse(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU()))
    seen = []
    observers.append(SimpleNamespace(see=lambda *call: seen.append(call)))
    try:
        y = model(torch.randn(3, 4))
    finally:
        observers.clear()
    ((layers, activation, output),) = seen
    assert layers == tuple(model) and activation == "relu" and output is y
    y.sum().backward()
    # The bias of the linear layer moves nothing but the running mean, and is known to.
    assert torch.equal(model[0].bias.grad, torch.zeros(5))
    assert kernels(model, torch.randn(3, 4)) == ["gdbp::batch_norm", "gdbp::batch_norm_update_"]


def test_channels_that_are_not_features():
    """(N, C, L) behind a linear layer: normalised by its rows, where its bias is no offset."""
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(3), nn.ReLU()).double()
    model = gdbp.fuse(copy.deepcopy(plain))
    x = torch.randn(6, 3, 4, dtype=DOUBLE)
    torch.testing.assert_close(trained(model, x), trained(plain, x))


ACTIVATIONS = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Sigmoid(), nn.Tanh(),
    nn.ELU(), nn.ELU(inplace=True), nn.Softplus(),
]  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_every_activation(activation, norm):
    layers = [nn.Linear(4, 5), *([nn.BatchNorm1d(5)] if norm else []), activation]
    plain = nn.Sequential(*layers).double()
    model, report = fused(copy.deepcopy(plain))
    assert len(report.fused) == 1 and not report.left
    x = torch.randn(7, 4, dtype=DOUBLE)
    torch.testing.assert_close(trained(model, x), trained(plain, x))


class Hooked(nn.Sequential):
    """A subclass without a forward of its own is a Sequential."""


OTHERS = {
    "LeakyReLU": (nn.LeakyReLU(0.2), "followed by 1, leaky_relu with negative_slope=0.2; kernels have 0.01"),
    "ELU": (nn.ELU(0.5), "followed by 1, elu with alpha=0.5; kernels have 1.0"),
    "Softplus": (nn.Softplus(2.0), "followed by 1, softplus with beta=2.0; kernels have 1.0"),
    "threshold": (nn.Softplus(threshold=3.0), "followed by 1, softplus with threshold=3.0; kernels have 20.0"),
    "Hardswish": (nn.Hardswish(), "followed by 1, a Hardswish"),
    "Dropout": (nn.Dropout(0.0), "followed by 1, a Dropout"),
    "a subclass": (type("Mine", (nn.ReLU,), {"forward": lambda self, x: x.sin()})(), "followed by 1, a Mine"),
    "a linear layer": (nn.Linear(5, 5), "followed by 1, a Linear"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_has_no_kernel_is_left(case):
    layer, reason = OTHERS[case]
    plain = Hooked(nn.Linear(4, 5), layer)
    model, report = fused(copy.deepcopy(plain))
    assert type(model) is Hooked and not report.fused and reasons(report)["0"] == reason
    x = torch.randn(3, 4)
    assert torch.equal(model(x), plain(x))


class MyLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


CANDIDATES = {
    "subclass": (MyLinear(4, 5), "it is a MyLinear, whose forward is its own"),
    "lazy": (nn.LazyLinear(5), "it is a LazyLinear, whose forward is its own"),
    "parametrized": (parametrizations.weight_norm(nn.Linear(4, 5)), "it is parametrized"),
    "complex": (nn.Linear(4, 5, dtype=torch.complex64), "its weight is torch.complex64, for which there are no kernel"),
    "with activation": (gdbp.nn.Linear(4, 5, activation="silu"), "it computes its activation, silu, already"),
    "pruned": (prune.l1_unstructured(nn.Linear(4, 5), "weight", 2), "it has hooks"),
}


@pytest.mark.parametrize("case", CANDIDATES)
def test_layers_that_are_not_what_they_seem(case):
    layer, reason = CANDIDATES[case]
    plain = nn.Sequential(layer, nn.Tanh())
    model, report = fused(nn.Sequential(layer, nn.Tanh()))
    assert not report.fused and reasons(report)["0"].startswith(reason)
    x = torch.randn(3, 4, dtype=torch.complex64 if case == "complex" else None)
    assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_what_they_saw(position, hook):
    """Set before or after fusing, and gone when they are removed."""
    x = torch.randn(6, 4, dtype=DOUBLE, requires_grad=True)
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh()).double()
    results = []
    for when in ("never", "before", "after"):
        model, seen = copy.deepcopy(plain), []
        if when == "after":
            gdbp.fuse(model)
        register = getattr(model[position], f"register_{hook}_hook")
        handle = register(lambda module, *tensors, seen=seen: seen.append(tensors))
        if when == "before":
            _, report = fused(model)
            assert any("has hooks" in reason for reason in reasons(report).values())
        model(x).square().sum().backward()
        results.append(seen)
        assert len(seen) == 1
        handle.remove()
        if when != "never":
            assert gdbp.fuse(model)(x).isfinite().all() and len(seen) == 1
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def test_changes_after_fusing_count():
    def changed(how, fuse):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
        if fuse:
            gdbp.fuse(model)
        how(model)
        return model(torch.linspace(-1, 1, 24).view(6, 4))

    def replace(model):
        model[1] = nn.Hardtanh()

    def patch(model):
        model[2].forward = torch.cos

    ways = [
        lambda model: setattr(model[1], "negative_slope", 0.5),
        lambda model: model.append(nn.Linear(4, 2)).append(nn.GELU()),
        lambda model: model.insert(1, nn.Dropout(0.0)),
        lambda model: model.__delitem__(3),
        lambda model: parametrizations.orthogonal(model[0]),
        lambda model: prune.l1_unstructured(model[2], "weight", 4),
        lambda model: model[3].eval(),
        lambda model: nn.utils.parametrize.register_parametrization(model[2], "bias", nn.ReLU()),
        replace,
        patch,
    ]
    for how in ways:
        torch.testing.assert_close(changed(how, True), changed(how, False))


def test_global_hooks_see_every_module():
    model = gdbp.fuse(nn.Sequential(nn.Linear(4, 5), nn.ReLU()))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        model(torch.randn(3, 4))
    finally:
        handle.remove()
    assert seen == ["Linear", "ReLU", "FusedSequential"]


def test_sync_batch_norm():
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    model = gdbp.nn.SyncBatchNorm.convert_sync_batchnorm(gdbp.fuse(copy.deepcopy(plain)))
    assert type(model[1]) is nn.SyncBatchNorm
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), plain(x))


def test_optimizer_made_before():
    plain = MODELS["functional"][0]()
    model = copy.deepcopy(plain)
    optimizers = [gdbp.optim.AdamW(m.parameters(), lr=0.1) for m in (model, plain)]
    gdbp.fuse(model)
    x = torch.randn(7, 8)
    for _ in range(3):
        for m, optimizer in zip((model, plain), optimizers):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=1e-3, atol=1e-3)


def test_torch_func():
    plain = Functional().double()
    model = gdbp.fuse(copy.deepcopy(plain))
    x = torch.randn(6, 8, dtype=DOUBLE)

    def each(model):
        def one(parameters, x):
            return torch.func.functional_call(model, parameters, x.unsqueeze(0)).square().sum()

        return torch.vmap(torch.func.grad(one), in_dims=(None, 0))(dict(model.named_parameters()), x)

    torch.testing.assert_close(each(model), each(plain))


def test_autocast():
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3), nn.Tanh())
    model, x = gdbp.fuse(copy.deepcopy(plain)), torch.randn(9, 4)
    with torch.autocast("cpu"):
        a, b = model(x), plain(x)
    assert a.dtype is b.dtype is torch.bfloat16
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_who_calls_what():
    model = nn.ModuleDict({"tower": Tower(), "attention": nn.TransformerEncoderLayer(8, 2, 8), "mine": Shared()})
    _, report = fused(model, trace=False)
    why = reasons(report)
    assert why["tower.blocks.0"] == "it is called by a Tower, which is no Sequential, and trace is False"
    assert why["attention.linear1"] == "it is called by a TransformerEncoderLayer, which has a forward of its own"
    _, report = fused(nn.ModuleList([nn.Linear(2, 2)]))
    assert reasons(report) == {"0": "no forward of the model calls it"}
    model = Tower()
    model.forward = lambda x: x
    assert "the forward of Tower was replaced" in reasons(fused(model)[1]).values()


def test_a_bias_that_is_no_parameter():
    x = torch.randn(3, 4)
    for of in (lambda b: nn.Buffer(b), lambda b: b):
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        wanted, bias = model(x), model[0].bias.detach()
        del model[0].bias
        model[0].bias = of(bias)
        torch.testing.assert_close(gdbp.fuse(model)(x), wanted)


def test_report_is_a_table(capsys):
    model = nn.Sequential(OrderedDict(a=nn.Linear(4, 5), b=nn.ReLU(), c=nn.Linear(5, 3)))
    gdbp.fuse(model, report=print)
    assert capsys.readouterr().out.splitlines() == [
        "layers  computed as    why not fused",
        "a, b    linear + relu",
        "c                      nothing follows",
    ]


def test_refusals():
    with pytest.raises(TypeError, match="report is 3; expected a function, such as print"):
        gdbp.fuse(nn.Linear(2, 2), report=3)
    for call in (gdbp.fuse, gdbp.unfuse):
        with pytest.raises(TypeError, match=r"model is of type list; expected a torch\.nn\.Module"):
            call([nn.Linear(2, 2)])
    model = gdbp.fuse(nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2), nn.ReLU()))
    model[0].__class__ = type("Wrapped", (type(model[0]),), {})
    with pytest.raises(ValueError, match="0 was fused and has become a Wrapped since; undo that before unfuse"):
        gdbp.unfuse(model)
    assert type(model).__name__ == "FusedSequential"
