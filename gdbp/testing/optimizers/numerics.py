"""Checks of the numbers: accuracy, small shapes, values that are not finite, threads, gradients of another dtype."""

import torch

from gdbp.testing.compare import require, same_bits
from gdbp.testing.optimizers.subject import LIMIT_ULP, SUITE, Pair, Subject, randn
from gdbp.testing.report import NotApplicable

# Around the vector widths of kernels, with a full vector and a tail.
_SIZES = [(1,), (3, 5), (8,), (15,), (16,), (17,), (64, 3), (1025,)]


def _zeros(dtype: torch.dtype, sizes=_SIZES) -> list[torch.Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


@SUITE.check("accuracy float32")
def accuracy_float32(subject: Subject, rng: torch.Generator) -> str:
    values = [randn(v, rng) for v in _zeros(torch.float32)]
    return Pair(subject, values).run(10, rng).require_close("10 steps: ")


@SUITE.check("accuracy bfloat16")
def accuracy_bfloat16(subject: Subject, rng: torch.Generator) -> str:
    """Starts at 0, where no step is too small to show; the median forgives updates by sign near a sign change."""
    pair = Pair(subject, _zeros(torch.bfloat16)).run(1, rng)
    tiny = torch.finfo(torch.bfloat16).tiny
    still = sum(int(((p == 0) & (q.abs() > tiny)).sum()) for p, q in zip(pair.params, pair.exact, strict=True))
    count = sum(p.numel() for p in pair.params)
    require(still == 0, f"{still} of {count} elements do not move at the first step")
    median = pair.run(4, rng).ulps().median().item()
    require(median <= LIMIT_ULP, f"the median element is wrong by {median:.3g} ulp after 5 steps")
    return f"all elements move; median {median:.3g} ulp from float64 after 5 steps"


@SUITE.check("zero-size and 0-dim")
def small_shapes(subject: Subject, rng: torch.Generator) -> str:
    values = [torch.randn(shape, generator=rng) for shape in ((0,), (), (3, 0), (1,), (5,))]
    return Pair(subject, values).run(3, rng).require_close()


@SUITE.check("NaN and infinity visible")
def nonfinite(subject: Subject, rng: torch.Generator) -> str:
    pair = Pair(subject, [torch.randn(40, generator=rng)]).run(1, rng)
    (p,), (q,) = pair.params, pair.exact
    before = p.detach().clone(), q.detach().clone()
    g = randn(p, rng)
    g[3], g[17], g[18] = float("nan"), float("inf"), -float("inf")
    pair.step([g])
    if torch.equal(p, before[0]) and torch.equal(q, before[1]):
        return "the step is left out"
    states = pair.optimizer.state.get(p, {}).values()
    kept = [p.detach(), *(s for s in states if isinstance(s, torch.Tensor) and s.shape == p.shape)]
    require(any(bool(t[3].isnan()) for t in kept), "a NaN in the gradient is in neither the parameter nor its states")
    wrong = (p.isfinite() != q.isfinite()).nonzero().reshape(-1).tolist()
    require(not wrong, f"a gradient bad at 3, 17, 18: elements {wrong} are finite, but not in float64, or the reverse")
    return f"{int((~p.isfinite()).sum())} of 40 elements not finite, the same as in float64"


@SUITE.check("any thread count, same bits")
def threads(subject: Subject, rng: torch.Generator) -> str:
    values = [torch.randn(n, generator=rng) for n in (100_003, 7, 8193)]
    grads = [[randn(v, rng) for v in values] for _ in range(2)]
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        params = [v.clone().requires_grad_() for v in values]
        optimizer = subject.make(params)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()
        results.append(params)
    for count, other in ((2, results[1]), (3, results[2])):
        differing = sum(int((a != b).sum()) for a, b in zip(results[0], other, strict=True))
        require(differing == 0, f"{differing} elements differ between 1 and {count} threads")
    return "1, 2 and 3 threads"


@SUITE.check("gradient left as it is")
def gradient_untouched(subject: Subject, rng: torch.Generator) -> str:
    params = [torch.randn(size, generator=rng).requires_grad_() for size in ((33,), (4, 5))]
    optimizer = subject.make(params)
    for step in range(3):
        grads = [randn(p, rng) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            require(p.grad is not None and same_bits(p.grad, g), f"step {step + 1} changes .grad of parameter {i}")
    return "3 steps"


@SUITE.check("gradient of another dtype")
def gradient_dtype(subject: Subject, rng: torch.Generator) -> str:
    if not hasattr(torch.Tensor, "grad_dtype"):
        raise NotApplicable(f"torch {torch.__version__} has no Tensor.grad_dtype")
    pair = Pair(subject, [torch.zeros(40, dtype=torch.bfloat16)])
    pair.params[0].grad_dtype = None
    for _ in range(3):
        pair.step([torch.randn(40, generator=rng)])
    median = pair.ulps().median().item()
    require(median <= LIMIT_ULP, f"the median element is wrong by {median:.3g} ulp after 3 steps")
    return f"bfloat16 parameter, float32 gradient: median {median:.3g} ulp"
