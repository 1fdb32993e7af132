"""Losses, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

import gdbp.nn.functional as ours
from benchmarks.work import COMPILED, OURS, Case, Contender, Goal, Series, Setup, Tensors, Work, powers

# Rows, classes, goal, and the only dtype to measure, if any.
CROSS_ENTROPY = [
    (64, 10, Goal(1.5), None),
    *((4096, 1000, Goal(4.0, kept=2.5), dtype) for dtype in (None, torch.bfloat16)),
    *((1024, 32000, Goal(4.0, kept=2.5), dtype) for dtype in (None, torch.bfloat16)),
]
# Vocabularies of language models, on CUDA: GPT-2's, whose rows begin anywhere, and Llama 3's. Of more rows the check in
# float64 would need more memory than there is.
VOCABULARIES = [
    (4096, 50257, None, torch.bfloat16),
    (2048, 128256, Goal(1.0, limit=0.85), torch.bfloat16),
]
# The gradient written over the logits: within twice the time of one read and one write.
IN_PLACE = [
    (rows, classes, Goal(15.0, kept=4.0, limit=0.5), dtype)
    for rows, classes in ((4096, 1000), (1024, 32000))
    for dtype in (None, torch.bfloat16)
]
SOFT = [(1024, 32000, Goal(5.0), None)]
POINTWISE = {
    "mse": (ours.mse_loss, F.mse_loss, Goal(4.0, kept=1.5)),
    "huber": (ours.huber_loss, F.huber_loss, Goal(4.0, kept=1.5)),
    "smooth_l1": (ours.smooth_l1_loss, F.smooth_l1_loss, None),
    "bce": (ours.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, Goal(4.0, kept=1.5)),
}


def cases(smoke: bool) -> Iterator[Case]:
    for name, build, sizes in (
        ("cross_entropy", _cross_entropy, CROSS_ENTROPY),
        ("ce_inplace", _in_place, IN_PLACE),
        ("ce_soft_targets", _soft_targets, SOFT),
    ):
        for rows, classes, goal, dtype in [(3, 10, None, None)] if smoke else sizes:
            yield Case("loss", name, f"{rows}x{classes}", partial(build, rows, classes), goal, dtype)
    for rows, classes, goal, dtype in [] if smoke else VOCABULARIES:
        build = partial(_cross_entropy, rows, classes)
        yield Case("loss", "cross_entropy", f"{rows}x{classes}", build, goal, dtype, "cuda")
    for name, (our_loss, torch_loss, goal) in POINTWISE.items():
        for size, elements, wanted in [("1 K", 2**10, None)] if smoke else [("640", 640, None), ("16 M", 2**24, goal)]:
            build = partial(_pointwise, our_loss, torch_loss, elements)
            yield Case("loss", name, size, build, wanted)


def series(smoke: bool) -> Iterator[Series]:
    def classes(count: int, setup: Setup) -> Work:
        return _cross_entropy(4 if smoke else 1024, count, setup)

    def batch(count: int, setup: Setup) -> Work:
        return _cross_entropy(count, 10, setup)

    yield Series("loss", "cross_entropy", "classes", classes, powers(8, 128 if smoke else 2**15, 4))
    yield Series("loss", "cross_entropy", "batch", batch, powers(16, 256 if smoke else 4**8, 4))


def _cross_entropy(rows: int, classes: int, setup: Setup) -> Work:
    logits, labels = setup.normal(rows, classes, std=2.0), setup.labels(rows, classes)
    return _work(ours.cross_entropy, F.cross_entropy, logits, labels, 2, setup)


def _soft_targets(rows: int, classes: int, setup: Setup) -> Work:
    logits, target = setup.normal(rows, classes, std=2.0), setup.normal(rows, classes).float().softmax(1)
    # A gradient is the difference of two probabilities.
    return _work(ours.cross_entropy, F.cross_entropy, logits, target.to(setup.dtype), 3, setup, floor="rms")


def _in_place(rows: int, classes: int, setup: Setup) -> Work:
    """Every repetition finds the last one's gradient as its logits: other values, equal work. What is compared is the
    first."""
    logits, labels = setup.normal(rows, classes, std=2.0), setup.labels(rows, classes)
    work = _work(ours.cross_entropy, F.cross_entropy, logits, labels, 2, setup)
    owned, in_place = logits.clone(), partial(ours.cross_entropy, inplace_backward=True)

    def run() -> Tensors:
        leaf = owned.detach().requires_grad_()
        value = in_place(_Computed.apply(leaf), labels)
        value.backward()
        results = (value, leaf.grad)
        leaf.grad = None
        return results

    def first() -> Tensors:
        owned.copy_(logits)
        return run()

    work.contenders[OURS] = Contender(run, first)
    return work


class _Computed(torch.autograd.Function):
    """The same memory as a tensor that was computed, which alone may be written over."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _pointwise(our_loss, torch_loss, size: int, setup: Setup) -> Work:
    prediction, target = setup.normal(size), setup.normal(size)
    if our_loss is ours.binary_cross_entropy_with_logits:
        return _work(our_loss, torch_loss, prediction, target.sigmoid(), 3, setup, floor="rms")
    return _work(our_loss, torch_loss, prediction, target, 3, setup)


def _work(
    our_loss: Callable, torch_loss: Callable, input, target, accesses: int, setup: Setup, floor: str = "none"
) -> Work:
    """`accesses`: to each element; every input is read once and the gradient written once."""
    traffic = accesses * input.nbytes

    def contender(loss) -> Contender:
        run = partial(_run, loss, input.clone().requires_grad_(), target)
        return Contender(run, run)

    def reference() -> Tensors:
        exact = target.double() if target.is_floating_point() else target
        return _run(torch_loss, input.double().requires_grad_(), exact)

    contenders = {OURS: contender(our_loss), "torch": contender(torch_loss)}
    if setup.compile:
        contenders[COMPILED] = contender(torch.compile(torch_loss))
    if not target.is_floating_point():
        # It writes the gradient over the logits, so only its first result, which is compared, is that of these logits.
        setup.add(contenders, "liger", lambda liger: contender(liger.LigerCrossEntropyLoss()))
    limit = setup.copy_limit(traffic, f"{accesses * input.itemsize} B an element")
    # Wide, for torch rounds log-probabilities to the input's dtype, which costs half types some bits.
    return Work(contenders, reference, tolerance=256, floor=floor, limit=limit, bytes=traffic)


def _run(loss, input, target) -> Tensors:
    value = loss(input, target)
    value.backward()
    results = (value, input.grad)
    input.grad = None
    return results
