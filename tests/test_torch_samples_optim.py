"""torch's own test data for optimizers (``optim_db``), with our class in the place of torch's."""

import copy
import sys
import types
import unittest
import warnings

import pytest
import torch

import gdbp
from tests.optimizers import error, give, largest, steps

pytest.importorskip("numpy")


def _optim_db():
    """torch's table, which imports a package of its test suite that users don't have; nothing here calls it."""
    if "expecttest" not in sys.modules:
        try:
            import expecttest  # noqa: F401
        except ImportError:
            stub = types.ModuleType("expecttest")
            stub.TestCase = unittest.TestCase
            sys.modules["expecttest"] = stub
    from torch.testing._internal import common_optimizers

    return common_optimizers


COMMON = _optim_db()
INFOS = {info.optim_cls.__name__: info for info in COMMON.optim_db if info.optim_cls.__name__ in gdbp.optim.__all__}
SIZES = [(), (1,), (3, 5), (33,), (4, 3, 2, 2)]


def test_every_class_that_torch_has_is_here():
    assert set(INFOS) == set(gdbp.optim.__all__) - {"Lion"}


SAMPLES = [
    pytest.param(name, sample, id=f"{name}-{sample.desc}")
    for name, info in INFOS.items()
    for sample in info.optim_inputs_func("cpu", None)
]
ERRORS = [
    pytest.param(name, sample, id=f"{name}-{i}-{sample.optimizer_error_input.desc}")
    for name, info in INFOS.items()
    for i, sample in enumerate(info.optim_error_inputs_func("cpu", torch.float32))
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name,sample", SAMPLES)
def test_inputs(name, sample, dtype):
    """Eight steps, no further from torch's for-loop in float64 than torch's for-loop in the same dtype."""
    assert sample.params is None
    values = [torch.randn(size, dtype=torch.float64).to(dtype) for size in SIZES]
    grads = [[torch.randn_like(v) for v in values] for _ in range(8)]
    ours, our_state = steps(getattr(gdbp.optim, name), values, grads, sample.kwargs)
    theirs, their_state = steps(INFOS[name].optim_cls, values, grads, {**sample.kwargs, "foreach": False})
    exact, _ = steps(INFOS[name].optim_cls, [v.double() for v in values], grads, {**sample.kwargs, "foreach": False})
    unit = torch.finfo(dtype).eps * largest(exact)
    assert error(ours, exact) <= max(2 * error(theirs, exact), 4 * unit)
    assert [list(state) for state in our_state] == [list(state) for state in their_state]
    for mine, other in zip(our_state, their_state, strict=True):
        for key, value in mine.items():
            assert (value.dtype, value.shape, value.device) == (other[key].dtype, other[key].shape, other[key].device)


@pytest.mark.parametrize("name,sample", SAMPLES)
@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable"])
def test_flags(name, sample, flag):
    """The flags that choose torch's implementation are taken where torch's class takes them, and change no number;
    differentiable is torch's own step, whose numbers differ a little from its for-loop's."""
    if flag == "fused" and flag not in INFOS[name].supported_impls:
        with pytest.raises((RuntimeError, TypeError)):
            INFOS[name].optim_cls([torch.zeros(1, requires_grad=True)], **sample.kwargs, fused=True)
        return
    values = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    grads = [[torch.randn_like(v) for v in values] for _ in range(3)]
    if flag == "differentiable":
        plain, _ = steps(INFOS[name].optim_cls, values, grads, {**sample.kwargs, flag: True})
    else:
        plain, _ = steps(getattr(gdbp.optim, name), values, grads, {**sample.kwargs, flag: False})
    flagged, _ = steps(getattr(gdbp.optim, name), values, grads, {**sample.kwargs, flag: True})
    assert error(plain, flagged) <= 1e-13


@pytest.mark.parametrize("name,sample", ERRORS)
def test_error_inputs(name, sample):
    """torch's exception with torch's text; arguments are judged before parameters, which the table leaves None."""
    assert sample.error_on is COMMON.OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = sample.optimizer_error_input
    params = given.params
    if params is None and issubclass(sample.error_type, Warning):
        params = [torch.zeros(1, requires_grad=True)]
    for cls in (INFOS[name].optim_cls, getattr(gdbp.optim, name)):
        if issubclass(sample.error_type, Warning):
            with pytest.warns(sample.error_type, match=sample.error_regex):
                cls(params, **given.kwargs)
        else:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                cls(params, **given.kwargs)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", INFOS)
def test_sparse_gradients(name):
    """torch's sparse options where it has them: our step does what torch's does, or says in a sentence that it
    cannot, and changes nothing."""
    options, schedulers = INFOS[name].metadata_for_sparse
    p = torch.randn(10, 3, dtype=torch.float64).requires_grad_()
    q = p.detach().clone().requires_grad_()
    before = p.detach().clone()
    ours = getattr(gdbp.optim, name)([p], **options)
    theirs = INFOS[name].optim_cls([q], **options, foreach=False)
    makers = schedulers or [lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer)]
    for make in makers:
        scheduled = [make(optimizer) for optimizer in (ours, theirs)]
        for _ in range(3):
            rows = torch.randint(0, 10, (1, 4))
            p.grad = torch.sparse_coo_tensor(rows, torch.randn(4, 3, dtype=torch.float64), (10, 3))
            q.grad = p.grad.clone()
            try:
                ours.step()
            except RuntimeError as refusal:
                assert "sparse" in str(refusal) and "expected a dense one" in str(refusal)
                assert torch.equal(p, before) and all(not s.get("step", 0) for s in ours.state.values())
                return
            theirs.step()
            assert INFOS[name].supports_sparse, "torch refuses these"
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            for scheduler in scheduled:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    scheduler.step(
                        *([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else [])
                    )


@pytest.mark.parametrize("name", INFOS)
def test_schedulers(name):
    """torch's own choice of schedulers for each class, on one and on several parameter groups."""
    for schedulers in INFOS[name].scheduler_inputs:
        values = [torch.randn(4, dtype=torch.float64) for _ in range(2)]
        found = []
        for cls in (getattr(gdbp.optim, name), INFOS[name].optim_cls):
            params = [v.clone().requires_grad_() for v in values]
            groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.02}]
            optimizer = cls(groups, lr=0.01, foreach=False)
            scheduled = [make(optimizer) for make in schedulers]
            rng = torch.Generator().manual_seed(1)
            for _ in range(12):
                for p in params:
                    p.grad = torch.randn(4, dtype=torch.float64, generator=rng)
                optimizer.step()
                for scheduler in scheduled:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([1.0] if plateau else []))
            found.append((params, [group["lr"] for group in optimizer.param_groups]))
        assert error(found[0][0], found[1][0]) <= 1e-13 and found[0][1] == found[1][1]


@pytest.mark.parametrize("name,sample", SAMPLES)
def test_checkpoints_with_torchs_options(name, sample):
    """What torch saves with these options loads here, goes on, and loads back in torch."""
    values = [torch.randn(size, dtype=torch.float64) for size in SIZES]
    grads = [[torch.randn_like(v) for v in values] for _ in range(2)]
    classes = [INFOS[name].optim_cls, getattr(gdbp.optim, name), INFOS[name].optim_cls]
    exact, _ = steps(classes[0], values, [*grads, *grads, *grads], {**sample.kwargs, "foreach": False})
    state, params = None, values
    for cls in classes:
        params = [p.detach().clone().requires_grad_() for p in params]
        optimizer = cls(params, **copy.deepcopy(sample.kwargs), foreach=False)
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for step in grads:
            give(params, step)
            optimizer.step()
        state = optimizer.state_dict()
    # Loading in torch turns NAdam's product into the parameter's dtype.
    assert error(params, exact) <= (1e-7 if name == "NAdam" else 1e-13)
