"""A linear layer and cross-entropy of its output, a chunk of rows at a time: the logits never exist as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdbp import _load, reference
from gdbp.ops._function import (
    Function,
    differentiate,
    is_batched,
    is_differentiated,
    is_fused,
    is_transformed,
    needs_autograd,
)
from gdbp.ops.loss import cross_entropy

if _load.available:
    from gdbp import _C

# torch.compile of torch 2.11 loses the gradients of _LinearCrossEntropy without a word; of 2.13 it has them.
_TRACED_WHOLE = torch.__version__ < (2, 13)
# From here on weights are transposed a panel at a time (csrc/linear/wide_cpu.cpp); there are panels enough for threads.
_MANY_CLASSES = 2048
# Elements of the weight that exist in float32 at a time, where a half type's products are formed in it: 4 MB.
_PANEL = 2**20


class _Logits:
    """Those of one chunk after the other, in the same memory: fresh pages would cost more than the loss. Of half types
    in float32, as the loss is computed and its gradient kept."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None, rows: int):
        self.weight, self.bias = weight, bias
        classes, features = weight.shape
        # In which its products are formed, where the processor has no instructions for them in x's own.
        self.product = x.dtype
        if x.element_size() < 4 and x.is_cpu and not _C.has_products_of(str(x.dtype).removeprefix("torch.")):
            self.product = torch.float32
        shape = (min(rows, x.shape[0]), classes)
        self.memory = x.new_empty(shape, dtype=self.product)
        # Which a BLAS would copy into an order of its own as a whole, for each chunk.
        self.by_panels = x.is_cpu and self.product.itemsize >= 4 and features > 0 and classes >= _MANY_CLASSES
        self.wide = x.new_empty(shape, dtype=torch.float32) if self.product.itemsize < 4 else None

    def of(self, x: Tensor) -> Tensor:
        logits = self.memory[: x.shape[0]]
        if self.by_panels:
            torch.ops.gdbp.linear_wide_(logits, x, self.weight, self.bias)
            return logits
        x, weight = x.to(self.product), self.weight.to(self.product)
        if self.bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(self.bias.to(self.product), x, weight.t(), out=logits)
        return logits if self.wide is None else self.wide[: x.shape[0]].copy_(logits)

    def back(self, grad: Tensor, out: Tensor) -> None:
        """``out = grad @ weight``, for the gradient of ``of()``'s result."""
        if out.dtype is self.product:
            torch.mm(grad.to(out.dtype), self.weight, out=out)
            return
        rows = max(_PANEL // max(self.weight.shape[1], 1), 1)
        total = out.new_zeros(out.shape, dtype=self.product)
        for part, weight in zip(grad.split(rows, 1), self.weight.split(rows)):
            total.addmm_(part, weight.to(self.product))
        out.copy_(total)


def _add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """``total += grad.T @ x`` with total in full precision, whatever x is."""
    if x.dtype is total.dtype:
        total.addmm_(grad.t(), x)
    elif x.is_cuda:
        total.add_(torch.mm(grad.to(x.dtype).t(), x, out_dtype=total.dtype))
    else:
        total.addmm_(grad.t(), x.to(total.dtype))


# An operator, for torch.compile and torch.export: the loop over chunks would hold them to one number of rows.
_SCHEMA = (
    "(Tensor? upstream, Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? second, Tensor? share,"
    " Tensor? class_weight, SymInt rows, bool[3] mask, int ignore_index, float label_smoothing, float z_loss,"
    " float softcap) -> (Tensor loss, Tensor divisor, Tensor[] gradients)"
)


@torch.no_grad()
def _run(upstream, x, weight, bias, target, second, share, class_weight, rows, mask, *options):
    """The loss of every row, or with an ``upstream`` of no dimensions their sum; the weights of all rows; and the
    gradients that are asked for, where each row's loss has the gradient ``upstream``, one number or one for each."""
    if rows < 1 or (upstream is None and any(mask)):
        raise ValueError(
            f"linear_cross_entropy: rows is {rows} and upstream {upstream}; expected one row at least, and an "
            "upstream gradient where gradients are asked for"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    class_weight = None if class_weight is None else class_weight.to(wide)
    grads = _gradients(x, weight, mask)
    losses, divisor = [], x.new_zeros((), dtype=torch.float64)
    upstream = None if upstream is None else upstream.to(wide)
    each = "none" if upstream is None or upstream.dim() else "sum"
    chunk = _Logits(x, weight, bias, rows)
    for first in range(0, x.shape[0], rows):
        at = slice(first, first + rows)
        logits = chunk.of(x[at])
        labels = [None if t is None else t[at].to(wide) if t is target and t.is_floating_point() else t[at]
                  for t in (target, second, share)]  # fmt: skip
        try:
            loss, stats, part = torch.ops.gdbp.cross_entropy(logits, *labels, class_weight, None, each, *options, False)
        except IndexError:
            _raise_with_row((target, second), options[0], weight.shape[0])
            raise
        losses.append(loss.reshape(-1))
        divisor += part
        if not any(mask):
            continue
        above = upstream if each == "sum" else upstream[at]
        torch.ops.gdbp.cross_entropy_backward_(above, logits, *labels, class_weight, stats, part, each, *options)
        if mask[0]:
            chunk.back(logits, grads[0][at])
        if mask[1]:
            _add_product(grads[1], logits, x[at])
        if mask[2]:
            grads[2] += logits.sum(0)
    loss = torch.cat(losses) if losses else x.new_zeros(0, dtype=wide)
    return loss.double().sum() if each == "sum" else loss, divisor, [g for g in grads if g is not None]


def _gradients(x: Tensor, weight: Tensor, mask: Sequence[bool]) -> list[Tensor | None]:
    """Zeros for those of x, weight and bias; these two are sums, which half types would lose."""
    wide = torch.promote_types(x.dtype, torch.float32)
    shapes, dtypes = (x.shape, weight.shape, weight.shape[:1]), (x.dtype, wide, wide)
    return [x.new_zeros(s, dtype=d) if m else None for s, d, m in zip(shapes, dtypes, mask)]


def _shapes(upstream, x, weight, bias, target, second, share, class_weight, rows, mask, *options):
    is_sum = upstream is not None and upstream.dim() == 0
    dtype = torch.float64 if is_sum else torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(() if is_sum else x.shape[:1], dtype=dtype)
    return loss, x.new_empty((), dtype=torch.float64), [g for g in _gradients(x, weight, mask) if g is not None]


if _load.available:
    torch.library.define("gdbp::linear_cross_entropy", _SCHEMA, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl("gdbp::linear_cross_entropy", ("cpu", "cuda"), _run)
    torch.library.register_fake("gdbp::linear_cross_entropy", _shapes)


def _raise_with_row(targets: Sequence[Tensor | None], ignore_index: int, classes: int) -> None:
    """The operator's error, with the row counted from the first of all and not of its chunk."""
    for target in targets:
        if target is None:
            continue
        bad = (target != ignore_index) & ((target < 0) | (target >= classes))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"Target {int(target[row])} is out of bounds: linear_cross_entropy got it for row {row}; expected a "
                f"class from 0 to {classes - 1}, or ignore_index = {ignore_index}"
            ) from None


class _LinearCrossEntropy(Function):
    """Forward finds those gradients that ``mask`` names, for an upstream gradient of 1, while it has the logits; the
    first backward hands them over, scaled. Any others are computed then, in which the logits are formed again."""

    @staticmethod
    def forward(
        x, weight, bias, target, second, share, class_weight, normalizer, rows, mask, empty, reduction, *options
    ):
        one = None if reduction == "none" else x.new_ones((), dtype=torch.float64)
        tensors = (x, weight, bias, target, second, share, class_weight)
        loss, divisor, grads = torch.ops.gdbp.linear_cross_entropy(one, *tensors, rows, mask, *options)
        divisor = divisor if normalizer is None else normalizer.clone()
        if reduction == "mean":
            mean = loss / divisor
            loss = torch.where(divisor == 0, torch.zeros_like(mean), mean) if empty else mean
        return loss.to(torch.promote_types(x.dtype, torch.float32)), divisor, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.rows, mask, _, ctx.reduction, ignore_index, smoothing, z_loss, softcap = inputs
        ctx.options = (ignore_index, smoothing, z_loss, softcap)
        _, divisor, *grads = output
        ctx.mark_non_differentiable(divisor, *grads)
        ctx.set_materialize_grads(False)
        # Beside the saved tensors: only a gradient that nobody else holds is taken over without a copy.
        ctx.for_one, ctx.grads = bool(grads), _spread(grads, mask) if grads else None
        ctx.save_for_backward(*tensors, divisor)

    @staticmethod
    def backward(ctx, grad_output, *_):
        nothing = (None,) * 13
        if grad_output is None:
            return None, None, None, *nothing
        *tensors, normalizer, divisor = ctx.saved_tensors
        if is_differentiated() or is_transformed() or is_batched(grad_output):
            return *_differentiable(ctx, grad_output, tensors, normalizer), *nothing
        mask, scale = ctx.needs_input_grad[:3], grad_output.to(divisor.dtype)
        if ctx.reduction == "mean":
            scale = torch.where(divisor == 0, torch.zeros_like(scale), scale / divisor)
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            upstream = torch.ones_like(scale) if ctx.for_one else scale
            _, _, grads = torch.ops.gdbp.linear_cross_entropy(upstream, *tensors, ctx.rows, mask, *ctx.options)
            grads = _spread(grads, mask)
        if ctx.for_one:
            grads = [g.mul_(scale) if m else None for g, m in zip(grads, mask)]
        return *(None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors)), *nothing

    @staticmethod
    def vmap(info, in_dims, *arguments):
        tensors, (_, _, empty, *options) = arguments[:8], arguments[8:]

        def whole(x, weight, bias, *others):
            logits = x @ weight.t()
            return reference.cross_entropy(logits if bias is None else logits + bias, *others, empty, *options)

        loss = torch.vmap(whole, in_dims=in_dims[:8])(*tensors)
        return (loss, loss.new_empty(())), (0, None)


class _OfOperator(Function):
    """The operator alone, whose loss a program of torch.export has left."""

    @staticmethod
    def forward(*arguments):
        loss, divisor, grads = torch.ops.gdbp.linear_cross_entropy(*arguments)
        return loss, divisor, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        loss, *others = output
        _, *tensors, ctx.rows, _, ignore_index, smoothing, z_loss, softcap = inputs
        ctx.options = (ignore_index, smoothing, z_loss, softcap)
        ctx.reduction = "none" if loss.dim() else "sum"
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output, *_):
        nothing = (None,) * 10
        if grad_output is None:
            return None, None, None, None, *nothing
        tensors, mask = ctx.saved_tensors, ctx.needs_input_grad[1:4]
        if is_differentiated() or is_transformed() or is_batched(grad_output):
            return None, *_differentiable(ctx, grad_output, tensors, None), *nothing
        _, _, grads = torch.ops.gdbp.linear_cross_entropy(grad_output, *tensors, ctx.rows, mask, *ctx.options)
        return None, *(None if g is None else g.to(t.dtype) for g, t in zip(_spread(grads, mask), tensors)), *nothing


def _apply_operator(*arguments):
    loss, divisor, *grads = _OfOperator.apply(*arguments)
    return loss, divisor, grads


if _load.available:
    differentiate("linear_cross_entropy", _apply_operator)


def _spread(grads: Sequence[Tensor], mask: Sequence[bool]) -> list[Tensor | None]:
    rest = iter(grads)
    return [next(rest) if m else None for m in mask]


def _differentiable(ctx, grad_output, tensors, normalizer):
    """The gradients as a graph that can be differentiated again; here the logits are formed as a whole."""
    x, weight, bias, *others = tensors
    logits = x @ weight.t() if bias is None else x @ weight.t() + bias
    grad, _ = reference.cross_entropy_backward(grad_output, logits, *others, normalizer, ctx.reduction, *ctx.options)
    return grad @ weight, grad.t() @ x, None if bias is None else grad.sum(0)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    second: Tensor | None,
    share: Tensor | None,
    class_weight: Tensor | None,
    normalizer: Tensor | None,
    rows: int,
    empty_is_zero: bool,
    reduction: str,
    *options,
) -> Tensor:
    """Of (N, in_features) rows, a (C, in_features) weight and (C,) bias, ``rows`` at a time; the rest is as in
    :func:`gdbp.ops.cross_entropy`. Not differentiable in the target."""
    tensors = (x, weight, bias, target, second, share, class_weight, normalizer)
    if not (_load.available and is_fused(*tensors)) or (_TRACED_WHOLE and torch.compiler.is_compiling()):
        logits = torch.nn.functional.linear(x, weight, bias)
        return cross_entropy(logits, *tensors[3:], reduction, *options, empty_is_zero)
    inputs, mask = (x, weight, bias), [False] * 3
    if not needs_autograd(*inputs):
        return _LinearCrossEntropy.forward(*tensors, rows, mask, empty_is_zero, reduction, *options)[0]
    # Of float16 a gradient for 1 may be 0 or infinite where the one that is asked for is neither: that one is computed.
    # What is traced has no gradients that backward could take over and forget.
    traced = torch.compiler.is_compiling() or is_transformed()
    if reduction != "none" and x.dtype is not torch.float16 and not traced:
        mask = [t is not None and t.requires_grad for t in inputs]
    return _LinearCrossEntropy.apply(*tensors, rows, mask, empty_is_zero, reduction, *options)[0]
