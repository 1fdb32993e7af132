"""Random dense and normalisation layers (shapes, strides, dtypes, activations) against float64: 3,000 cases.

Errors are in units in the last place of the layer's dtype, at the size of what was added up: of an output that is
nearly 0 because its terms cancel, few digits can be had. What the pre-activation is off moves the slope, too, by at
most ``BEND`` times as much. Gradients into a kink, where rounding decides the slope, are 0 here.
"""

import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from gdbp.nn.functional import batch_norm, linear
from gdbp.reference import ACTIVATIONS
from tests.oracle import laid_out, spacing

CHUNKS, NORM_CHUNKS, CASES = 24, 6, 100
# The most ulp that the worst element of a case may be off; float64 is its own oracle, which rounds as well.
LIMITS = {torch.float64: 16, torch.float32: 8, torch.bfloat16: 2, torch.float16: 2}
# Bounds of slope and curvature of all activations here.
SLOPE, BEND = 1.13, 1.13
EPS = 1e-2
KINKED = ("relu", "leaky_relu")
DTYPES = [torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "contiguous", "transposed", "strided", "expanded", "misaligned"]
SIZES = [0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 130]


@dataclass
class Case:
    """Everything that a seed decides, in words for the failure's message."""

    seed: int

    def __post_init__(self):
        rng = random.Random(self.seed)
        self.activation = rng.choice(list(ACTIVATIONS))
        self.dtype = rng.choice(DTYPES)
        self.lead = tuple(rng.choice(SIZES[:9]) for _ in range(rng.choice([0, 2, 3]))) or (rng.choice(SIZES),)
        if rng.random() < 0.1:
            self.lead = ()
        self.inputs, self.outputs = rng.choice(SIZES), rng.choice(SIZES)
        if rng.random() < 0.05:
            self.outputs = rng.choice([1023, 1024, 1025])
        self.bias = rng.random() < 0.8
        self.scale = rng.choice([0.1, 1.0, 1.0, 4.0])
        self.layouts = [rng.choice(LAYOUTS) for _ in range(4)]
        self.threads = rng.choice([1, 2, 3])

    def tensors(self):
        """Input, weight, bias, upstream gradient."""
        generator = torch.Generator().manual_seed(self.seed)
        shapes = [(*self.lead, self.inputs), (self.outputs, self.inputs), (self.outputs,), (*self.lead, self.outputs)]
        spread = [self.scale, max(1, self.inputs) ** -0.5, 1.0, 1.0]
        drawn = [s * torch.randn(shape, generator=generator, dtype=torch.float64) for s, shape in zip(spread, shapes)]
        return [laid_out(t.to(self.dtype), layout) for t, layout in zip(drawn, self.layouts)]


def run(case: Case) -> dict[str, float]:
    """For output and gradients, how many ulp the worst element is off."""
    x, w, b, g = case.tensors()
    b = b if case.bias else None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, w, b)]
    z = F.linear(*exact)
    terms = F.linear(x.double().abs(), w.double().abs(), None if b is None else b.double().abs())
    if case.activation in KINKED:
        g = torch.where(z.abs() > 16 * spacing(terms, case.dtype), g, 0)
    y = ACTIVATIONS[case.activation][0](z)
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    ours = linear(*leaves, activation=None if case.activation == "none" else case.activation)
    wanted = [t for t in leaves if t is not None]
    found = [ours.detach(), *torch.autograd.grad(ours, wanted, g)]
    expected = [y.detach(), *torch.autograd.grad(y, [t for t in exact if t is not None], g.double())]
    # What is added up in each of them, in size.
    count = math.prod(case.lead)
    rows = (g.double().abs() * (SLOPE + BEND * terms)).reshape(count, case.outputs)
    inputs, weights = (t.double().abs().detach() for t in (x, w))
    sizes = [y.detach().abs() + SLOPE * terms, (rows @ weights).reshape(x.shape)]
    sizes += [rows.T @ inputs.reshape(count, case.inputs), rows.sum(0)]
    errors = {}
    for name, mine, right, size in zip(("output", "input", "weight", "bias"), found, expected, sizes):
        assert mine.shape == right.shape and mine.dtype is case.dtype
        off = (mine.double() - right).abs() / spacing(size, case.dtype)
        errors[name] = off.max().item() if off.numel() else 0.0
    return errors


def run_norm(case: Case) -> dict[str, float]:
    """The same of batch normalisation in training: channels are the case's outputs, and some have a length."""
    length = (case.inputs % 10,) if case.inputs % 2 else ()
    shape = (max(2, math.prod(case.lead) % 150), max(1, case.outputs), *length)
    generator = torch.Generator().manual_seed(case.seed)
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[1:2], shape[1:2], shape)]
    drawn[0] = case.scale * drawn[0] + 2  # a mean that is not 0
    x, w, b, g = (laid_out(t.to(case.dtype), layout) for t, layout in zip(drawn, case.layouts))
    exact = [t.double().requires_grad_() for t in (x, w, b)]
    dims = [0, *range(2, len(shape))]
    # By hand: torch's own is off by more than this in float64, and wrong for a strided weight.
    deviation = exact[0] - exact[0].mean(dims, keepdim=True)
    inverse = (deviation.square().mean(dims, keepdim=True) + EPS).rsqrt()
    weight, bias = (t.reshape(-1, *[1] * len(length)) for t in exact[1:])
    z = deviation * inverse * weight + bias
    mean, inverse = exact[0].detach().mean(dims, keepdim=True), inverse.detach()
    # Rounding the scale and the shift of a channel moves all of it.
    centered = (exact[0].detach() - mean).abs() * inverse
    terms = (centered + mean.abs() * inverse) * weight.detach().abs() + bias.detach().abs()
    if case.activation in KINKED:
        g = torch.where(z.abs() > 16 * spacing(terms, case.dtype), g, 0)
    y = ACTIVATIONS[case.activation][0](z)
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    activation = None if case.activation == "none" else case.activation
    ours = batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS, activation=activation)
    found = [ours.detach(), *torch.autograd.grad(ours, leaves, g)]
    expected = [y.detach(), *torch.autograd.grad(y, exact, g.double())]
    rows = g.double().abs() * (SLOPE + BEND * terms)
    products = rows * (centered + mean.abs() * inverse)
    spread = rows + rows.mean(dims, keepdim=True) + (centered + 1) * products.mean(dims, keepdim=True)
    sizes = [
        y.detach().abs() + SLOPE * terms,
        spread * inverse * weight.detach().abs(),
        products.sum(dims),
        rows.sum(dims),
    ]
    errors = {}
    for name, mine, right, size in zip(("output", "input", "weight", "bias"), found, expected, sizes):
        assert mine.shape == right.shape and mine.dtype is case.dtype
        off = (mine.double() - right).abs() / spacing(size, case.dtype)
        errors[name] = off.max().item() if off.numel() else 0.0
    return errors


def check(run, seeds: range) -> None:
    threads = torch.get_num_threads()
    try:
        for seed in seeds:
            case = Case(seed)
            torch.set_num_threads(case.threads)
            errors = run(case)
            worst = max(errors.values())
            assert worst <= LIMITS[case.dtype], f"{errors}; repeat with: {run.__name__}({case}); {vars(case)}"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_random(chunk):
    check(run, range(chunk * CASES, (chunk + 1) * CASES))


@pytest.mark.parametrize("chunk", range(NORM_CHUNKS))
def test_random_norm(chunk):
    check(run_norm, range(chunk * CASES, (chunk + 1) * CASES))
