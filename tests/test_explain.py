"""explain: who computed what, and nothing changed by asking."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gdbp
from gdbp.ops._function import why_not_fused
from tests.fuse_models import Attributes, Functional, Shared


def table(explanation):
    return [(c.layers, c.kernel, c.why) for c in explanation.calls]


def test_before_and_after_fuse():
    model, x = Attributes(), torch.randn(5, 8)
    before = gdbp.explain(model, x)
    assert [c.layers for c in before.calls] == [("fc1",), ("bn",), ("act",), ("fc2",), ("gelu",)]
    assert before.calls[0].kernel == "ATen addmm (cpu)"
    assert before.calls[0].why == "gdbp.fuse makes it linear + batch_norm + relu"
    after = gdbp.explain(gdbp.fuse(model), x)
    assert [(c.layers, c.kind, c.why) for c in after.calls] == [
        (("fc1", "bn", "act"), "Linear + BatchNorm1d + ReLU", ""),
        (("fc2", "gelu"), "Linear + GELU", ""),
    ]
    assert after.calls[0].kernel == "gdbp.batch_norm, gdbp.batch_norm_update_ (cpu)"
    assert after.calls[1].kernel == "gdbp.linear_with_pre (cpu)"
    assert gdbp.explain(model.eval(), x).calls[0].kernel == "gdbp.batch_norm (cpu)"


def test_functions_and_layers_called_twice():
    model, x = gdbp.fuse(Functional()), torch.randn(5, 8)
    rows = table(gdbp.explain(model, x))
    assert [row[0] for row in rows if row[2] == "" and row[1].startswith("gdbp")] == [
        ("fc1", "gelu_tanh()"), ("fc2", "tanh()"), ("fc4", "sigmoid()"),
    ]  # fmt: skip
    assert (("fc3",), "ATen addmm (cpu)", "followed by leaky_relu with negative_slope=0.2; kernels have 0.01") in rows
    # Narrow and in a row, they are computed together.
    assert table(gdbp.explain(gdbp.fuse(Shared()), x))[0][0] == ("fc1", "act", "fc1", "act")


def test_nothing_is_changed():
    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 2))

    for fuse in (False, True):
        model, x = Net(), torch.randn(6, 4)
        if fuse:
            gdbp.fuse(model)
        twin, versions = copy.deepcopy(model), [t._version for t in model.state_dict(keep_vars=True).values()]
        state, inside = torch.get_rng_state(), [dict(vars(m)) for m in model.modules()]
        gdbp.explain(model, x)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))
        assert [t._version for t in model.state_dict(keep_vars=True).values()] == versions
        assert all(p.grad is None for p in model.parameters()) and type(model) is type(twin)
        assert [dict(vars(m)) for m in model.modules()] == inside


def test_nothing_is_changed_in_a_layer_of_two_names():
    norm = nn.BatchNorm1d(4)
    before = norm.running_mean
    gdbp.explain(nn.Sequential(nn.Linear(4, 4), norm, nn.ReLU(), norm), torch.randn(6, 4))
    assert norm.running_mean is before and not before.any() and norm.num_batches_tracked == 0


class Mine(torch.Tensor):
    """A class that dispatches in Python, to the tensor inside of it."""

    @staticmethod
    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*[a.inner if isinstance(a, Mine) else a for a in args], **(kwargs or {}))


def test_what_falls_back_says_why():
    x = torch.randn(3, 4)
    layer = gdbp.nn.Linear(4, 5, activation="relu")
    assert table(gdbp.explain(layer, x)) == [(("(itself)",), "gdbp.linear (cpu)", "")]

    assert gdbp.explain(layer, Mine(x)).calls[0].why == "no kernels for a Mine"
    assert why_not_fused(x, x.to_sparse()) == "no kernels for torch.sparse_coo tensors" and why_not_fused(x) == ""
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        assert gdbp.explain(layer, dual).calls[0].why == "forward-mode differentiation"
    loss = gdbp.nn.MSELoss()
    assert table(gdbp.explain(loss, x, x)) == [(("(itself)",), "gdbp.pointwise_loss (cpu)", "")]


def test_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr("gdbp._load.available", False)
    monkeypatch.setattr("gdbp._load.reason", "it was not built")
    call = gdbp.explain(gdbp.nn.Linear(4, 5, activation="relu"), torch.randn(3, 4)).calls[0]
    assert call.kernel == "ATen addmm, relu (cpu)" and call.why == "it was not built"


def test_layers_that_are_not_in_runs_now():
    model = gdbp.fuse(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    handle = model[1].register_forward_hook(lambda *_: None)
    x = torch.randn(3, 4)
    calls = gdbp.explain(model, x).calls
    assert [c.layers for c in calls] == [("0",), ("1",), ("2",)]
    assert calls[0].why == "followed by 1, a ReLU; it has hooks" and calls[2].why == "nothing follows"
    handle.remove()
    handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
    try:
        assert gdbp.explain(model, x).calls[0].why == "hooks on all modules"
    finally:
        handle.remove()


def test_prints_a_table():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return F.relu(self.fc(x)).softmax(-1)

    assert str(gdbp.explain(gdbp.fuse(Net()), torch.randn(3, 4))).splitlines() == [
        "layers      kind           kernel               why not ours",
        "fc, relu()  Linear + relu  gdbp.linear (cpu)",
        "(itself)    FusedNet       ATen _softmax (cpu)",
    ]


def test_refusal():
    with pytest.raises(TypeError, match=r"module is of type Tensor; expected a torch\.nn\.Module"):
        gdbp.explain(torch.zeros(1))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        gdbp.explain(nn.Linear(3, 4), torch.zeros(2, 2))
