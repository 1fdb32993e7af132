"""The BatchNorm1d layer beside torch's: state, conversion, export, torch's samples; and what is refused."""

import copy
import pickle

import numpy as np
import pytest
import torch

import gdbp
from gdbp.nn.functional import batch_norm, linear_batch_norm
from gdbp.reference import ACTIVATIONS as TORCHS
from tests.oracle import FULL_DTYPES, leaf, torchs_tables

activations = pytest.mark.parametrize("activation", [None if name == "none" else name for name in TORCHS])


@activations
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}])
def test_module_is_torchs(activation, options):
    mine, other = gdbp.nn.BatchNorm1d(4, activation=activation, **options), torch.nn.BatchNorm1d(4, **options)
    assert list(mine.state_dict()) == list(other.state_dict()) and isinstance(mine, torch.nn.BatchNorm1d)
    assert all(map(torch.equal, mine.state_dict().values(), other.state_dict().values()))
    assert repr(mine) == repr(other) if activation is None else f"activation={activation!r}" in repr(mine)
    activate = TORCHS[activation or "none"][0]
    for shape in ((6, 4), (6, 4, 3)):
        for module in (mine, other):
            module.train()
        x = torch.randn(shape)
        torch.testing.assert_close(mine(x), activate(other(x)))
        torch.testing.assert_close(mine.state_dict(), other.state_dict())
        for module in (mine, other):
            module.eval()
        torch.testing.assert_close(mine(x), activate(other(x)))
        for clone in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert torch.equal(clone(x), mine(x)) and clone.activation == activation
    torch.nn.BatchNorm1d(4, **options).load_state_dict(mine.state_dict())
    gdbp.nn.BatchNorm1d(4, **options).load_state_dict(other.state_dict())
    with torch.device("meta"):
        assert gdbp.nn.BatchNorm1d(4, activation=activation)(torch.randn(2, 4)).shape == (2, 4)


def test_torchs_module_samples():
    (info,) = (info for info in torchs_tables("common_modules").module_db if info.module_cls is torch.nn.BatchNorm1d)
    count = 0
    for training in (True, False):
        for dtype in FULL_DTYPES:
            for sample in info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training):
                results = []
                for cls in (gdbp.nn.BatchNorm1d, torch.nn.BatchNorm1d):
                    given = sample.constructor_input
                    module = cls(*given.args, **given.kwargs).to(dtype).train(training)
                    x = leaf(sample.forward_input.args[0])
                    y = module(x)
                    results.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, *module.parameters()])])
                    results[-1] += module.buffers()
                torch.testing.assert_close(*results)
                count += 1
    assert count >= 12


def test_update_bn():
    torch.manual_seed(2)
    layers = gdbp.nn.Linear(3, 4), gdbp.nn.BatchNorm1d(4, activation="relu"), gdbp.nn.Linear(4, 2)
    mine = torch.nn.Sequential(*layers)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    other[:2].load_state_dict(mine[:2].state_dict())
    loader = [torch.randn(6, 3) for _ in range(5)]
    for model in (mine, other):
        torch.optim.swa_utils.update_bn(loader, model)
        assert model[1].momentum == 0.1
    torch.testing.assert_close(mine[1].state_dict(), other[1].state_dict())
    assert mine[1].num_batches_tracked == 5


def test_convert_sync_batchnorm():
    plain = torch.nn.Sequential(gdbp.nn.Linear(3, 4), gdbp.nn.BatchNorm1d(4))
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert type(converted[1]) is torch.nn.SyncBatchNorm and list(converted.state_dict()) == list(plain.state_dict())
    model = torch.nn.Sequential(
        gdbp.nn.Linear(3, 4), gdbp.nn.BatchNorm1d(4, activation="relu"), torch.nn.BatchNorm1d(4)
    )
    # torch's own knows nothing of activations, and must not lose one.
    with pytest.raises(RuntimeError, match=r"activation='relu'.*use gdbp.nn.SyncBatchNorm.convert_sync_batchnorm"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    converted = gdbp.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(converted[1]) is gdbp.nn.SyncBatchNorm and converted[1].activation == "relu"
    assert type(converted[2]) is torch.nn.SyncBatchNorm and "activation='relu'" in repr(converted[1])
    x = torch.randn(6, 3)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted.eval()(x), model.eval()(x))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert not hasattr(model[1], "qconfig")
    model[1].qconfig = "mine"
    assert model[1].qconfig == "mine"
    del model[1].qconfig
    # Again, by both: there is still an activation to lose.
    again = gdbp.nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert again[1].activation == "relu"
    with pytest.raises(RuntimeError, match="this SyncBatchNorm has activation='relu'"):
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(again)


def test_numbers_of_other_types():
    x, out = torch.randn(5, 3), []
    for kind in (float, np.float32, torch.tensor):
        layer = gdbp.nn.BatchNorm1d(3, eps=kind(1e-5), momentum=kind(0.25))
        out.append((layer(x), layer.running_mean))
    for y, mean in out[1:]:
        torch.testing.assert_close((y, mean), out[0])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.int32], ids=str)
def test_a_count_of_another_type(momentum, dtype):
    """As it is after ``.type()``."""
    ours, torchs = (of(3, momentum=momentum).double() for of in (gdbp.nn.BatchNorm1d, torch.nn.BatchNorm1d))
    for each in (ours, torchs):
        each.num_batches_tracked = each.num_batches_tracked.to(dtype)
    for _ in range(3):
        x = torch.randn(5, 3, dtype=torch.float64)
        torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())


def test_export():
    x = torch.randn(6, 4)
    for training in (True, False):
        module = gdbp.nn.BatchNorm1d(4, activation="gelu").train(training)
        twin = copy.deepcopy(module)
        rows = torch.export.Dim("rows", min=2)
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},)).module()
        for batch in (x, torch.randn(9, 4)):
            assert torch.equal(exported(batch), twin(batch))
        assert all(map(torch.equal, exported.buffers(), twin.buffers()))


def test_autocast():
    model = torch.nn.Sequential(gdbp.nn.Linear(3, 4), gdbp.nn.BatchNorm1d(4, activation="relu"))
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    other.load_state_dict(model.state_dict())
    x = torch.randn(16, 3)
    with torch.autocast("cpu"):
        results = [model(x), other(x)]
        weight, bias = model[0].weight, model[0].bias
        fused = linear_batch_norm(x, weight, bias, None, None, training=True, activation="relu")
        assert batch_norm(x, None, None, training=True).dtype is torch.float32
    assert results[0].dtype is results[1].dtype is fused.dtype is torch.bfloat16
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(fused, results[1], rtol=2e-2, atol=2e-2)


# ---- refusals ----

X, C = torch.zeros(4, 3), torch.ones(3)
REFUSED = {
    "one value": ((X[:1], None, None, None, None, True), ValueError, r"Expected more than 1 value per channel when t"),
    "one of one": ((X[:1, :, None], C, C, None, None, True), ValueError, r"input size torch.Size\(\[1, 3, 1\]\)"),
    "one dimension": ((X[0], C, C), ValueError, r"input has shape \(3,\); expected \(N, C\) or \(N, C, L\)"),
    "half of them": ((X, C, None), ValueError, r"must either both be None or neither be None"),
    "nothing known": ((X, None, None), RuntimeError, r"running_mean.* must be defined in evaluation mode"),
    "eps": ((X, C, C, None, None, True, 0.1, 0.0), ValueError, r"eps must be positive during training, but got 0.0"),
    "eps below 0": ((X, C, C, None, None, False, 0.1, -1.0), ValueError, r"eps must be non-negative, but got -1.0"),
    "weight": ((X, C, C, torch.ones(5)), RuntimeError, r"weight has shape \[5\]; expected \(3,\), one value"),
    "bias": ((X, C, C, None, torch.ones(1)), RuntimeError, r"bias has shape \[1\]; expected \(3,\)"),
    "running_mean": ((X, torch.ones(4), C), RuntimeError, r"running_mean has shape \[4\]; expected \(3,\)"),
    "running_var": ((X, C, torch.ones(3, 1)), RuntimeError, r"running_var has shape \[3, 1\]; expected \(3,\)"),
    "integers": ((X.long(), C, C), TypeError, r"input has dtype Long; expected float64.*convert"),
    "weight dtype": ((X, C, C, C.double()), RuntimeError, r"weight has dtype Double and input has Float; .*convert"),
    "bias dtype": ((X, C, C, C, C.half()), RuntimeError, r"bias has dtype Half and input has Float; .*convert"),
    "no tensor": (([1.0], C, C), TypeError, "input is of type list; expected a tensor"),
    "momentum": ((X, C, C, None, None, True, "a"), TypeError, "momentum is 'a'; expected a number"),
    "eps, no number": ((X, C, C, None, None, True, 0.1, None), TypeError, "eps is None; expected a number"),
    "meta": ((X, C, C, C.to("meta")), RuntimeError, r"weight is on meta and input on cpu; .*move one"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("grad", [False, True])
def test_refusals(case, grad):
    (x, *args), error, sentence = REFUSED[case]
    kept = [t.clone() for t in args if isinstance(t, torch.Tensor) and not t.is_meta]
    if grad and isinstance(x, torch.Tensor) and x.is_floating_point():
        x = x.clone().requires_grad_()
    with pytest.raises(error, match=sentence):
        batch_norm(x, *args, activation="relu")
    assert all(map(torch.equal, kept, [t for t in args if isinstance(t, torch.Tensor) and not t.is_meta]))


def test_refusals_of_training_change_nothing():
    mean = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"running_mean has shape \(4,\); expected \(3,\), one value for each"):
        batch_norm(X, mean, mean.clone(), training=True)
    module = gdbp.nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module(X[:1])
    assert module.num_batches_tracked == 0 and torch.equal(mean, torch.ones(4))
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        module(X[0])
    for call in (lambda: batch_norm(X, C, C, activation="swish"), lambda: gdbp.nn.BatchNorm1d(3, activation="swish")):
        with pytest.raises(ValueError, match="activation is 'swish'; expected None or one of relu"):
            call()


def test_operators_check_their_arguments():
    ops = torch.ops.gdbp
    y, stats = ops.batch_norm(X, None, None, None, None, None, 1e-5, "none")
    every = (True, True, True)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \[4, 2\]; expected \[4, 3\]"):
        ops.batch_norm_backward(y[:, :2], X, None, None, stats, True, 1e-5, "none", every)
    with pytest.raises(RuntimeError, match=r"stats has dtype Float, shape \[2, 3\].*what batch_norm returned"):
        ops.batch_norm_backward(y, X, None, None, stats.float(), True, 1e-5, "none", every)
    with pytest.raises(RuntimeError, match="grad_output has dtype Double"):
        ops.batch_norm_backward(y.double(), X, None, None, stats, True, 1e-5, "none", every)
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of none, relu"):
        ops.batch_norm(X, None, None, None, None, None, 1e-5, "swish")
    with pytest.raises(RuntimeError, match="one is None; expected both or neither"):
        ops.batch_norm(X, None, None, None, C, None, 1e-5, "none")
    with pytest.raises(RuntimeError, match="momentum is None and there is no num_batches_tracked"):
        ops.batch_norm_update_(C.clone(), C.clone(), None, stats, None, 4, None)


def test_linear_batch_norm_of_other_dimensions():
    """Its bias would be added to another axis than the one that is normalised."""
    with pytest.raises(ValueError, match=r"input has shape \(5, 3, 4\); expected \(N, in_features\)"):
        linear_batch_norm(torch.zeros(5, 3, 4), torch.zeros(3, 4), C, C, C)
