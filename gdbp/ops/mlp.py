"""A whole network of narrow layers in one call, forward or backward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gdbp import _load, reference
from gdbp.ops._function import (
    Function,
    is_batched,
    is_differentiated,
    is_direct,
    is_fused,
    is_transformed,
    needs_autograd,
)

if _load.available:
    from gdbp import _C

# Up to here the kernels are known to be faster than layers one by one, with gradients or in float32. Without gradients
# in 16 bits they are with a million rows, too: on an H200 156 us for six products 64 wide, 343 us for four 128 wide,
# torch 634 us for five and 697 us for three (benchmarks/results/nvidia-h200).
MOST_ROWS = 2**16
# Units of a layer, and its inputs; layers of a network.
MOST_WIDE, MOST_LAYERS = (_C.MOST_NARROW, _C.MOST_LAYERS) if _load.available else (0, 0)
_FACTORS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class _MLP(Function):
    """Keeps the input alone: backward makes the forward pass again, in shared memory."""

    @staticmethod
    def forward(activation, factors, input, *parameters):
        return torch.ops.gdbp.mlp(input, parameters[::2], parameters[1::2], activation, factors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.activation, ctx.factors, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad_output):
        tensors, mask = ctx.saved_tensors, ctx.needs_input_grad[2:]
        if is_differentiated() or is_transformed() or is_batched(grad_output):
            dtype = getattr(torch, ctx.factors, torch.float32)
            names = of_hidden(ctx.activation, len(tensors) // 2)
            return None, None, *backward_by_layers(grad_output, tensors, names, mask, dtype)
        input, *parameters = tensors
        grad_input, flat = torch.ops.gdbp.mlp_backward(
            grad_output, input, parameters[::2], parameters[1::2], ctx.activation, ctx.factors, mask
        )
        wanted = [p if m else None for p, m in zip(parameters, mask[1:], strict=True)]
        pieces = iter(flat.to(parameters[0].dtype).split([p.numel() for p in wanted if p is not None]))
        return None, None, grad_input, *(None if p is None else next(pieces).view_as(p) for p in wanted)


def backward_by_layers(
    grad_output: Tensor,
    tensors: Sequence[Tensor | None],
    activations: Sequence[str],
    mask: Sequence[bool],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of ``tensors``, input, weight, bias, weight, ..., that ``mask`` asks for, from layers one by one,
    which can be differentiated again and take many gradients at once; computed in ``dtype``, the tensors' own for
    None."""
    input, *parameters = (None if t is None else t.to(dtype or t.dtype) for t in tensors)
    layers = list(zip(parameters[::2], parameters[1::2], activations, strict=True))
    inputs = [input]
    for layer in layers[:-1]:
        inputs.append(reference.linear(inputs[-1], *layer))
    found: list[Tensor | None] = []
    for (weight, bias, activation), x in zip(reversed(layers), reversed(inputs), strict=True):
        grad_output, *of_layer = reference.linear_backward(grad_output, x, weight, bias, activation)
        found = of_layer + found
    return tuple(g.to(t.dtype) if m else None for g, t, m in zip([grad_output, *found], tensors, mask, strict=True))


def of_hidden(activation: str, layers: int) -> list[str]:
    """The activations of so many layers, where the last has none."""
    return [activation] * (layers - 1) + ["none"]


def is_taken(input: Tensor) -> bool:
    """Whether there are kernels for what lies there; none are for ``torch.jit.trace``, to which sizes are tensors."""
    return _load.available and (input.is_cuda or input.is_cpu) and not torch.jit.is_tracing()


def is_on_cpu(input: Tensor) -> bool:
    """Whether this is a tensor there, for a network's kernels."""
    return not torch.compiler.is_compiling() and torch.is_tensor(input) and input.is_cpu and is_taken(input)


def forward(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str
) -> Tensor | None:
    """``Linear`` layers with the activation, by name, behind each but the last; None where there is no kernel for them.

    It takes on CUDA float32, bfloat16 or float16, or autocast to one of these, up to MOST_ROWS rows where something is
    differentiated or products are of float32 and else any number, and layers up to 128 wide whose weights, and where
    something is differentiated also activations and sums of gradients, fit into a block's shared memory. On the CPU any
    number of rows in float32 or float64, and layers up to 128 wide. Not under ``torch.compile``, and not for transforms
    of torch.func.
    """
    if is_on_cpu(input):
        return on_cpu(input, weights, biases, of_hidden(activation, len(weights)))
    if not is_taken(input) or torch.compiler.is_compiling() or is_transformed():
        return None
    if not torch.is_autocast_enabled("cuda") and input.dtype is not weights[0].dtype:
        return None
    factors = factors_of(weights[0].dtype)
    tensors = (input, *(t for pair in zip(weights, biases, strict=True) for t in pair))
    # Under autocast the input may be of any dtype.
    if factors is None or input.dtype not in _FACTORS or not is_fused(*tensors):
        return None
    recorded = needs_autograd(*tensors)
    if input.numel() > MOST_ROWS * input.shape[-1] and (recorded or factors not in ("bfloat16", "float16")):
        return None
    if not torch.ops.gdbp.mlp_fits(input, weights, biases, activation, factors, recorded):
        return None
    if recorded:
        return _MLP.apply(activation, factors, *tensors)
    return torch.ops.gdbp.mlp(input, weights, biases, activation, factors)


def on_cpu(
    input: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str]
) -> Tensor | None:
    """``forward`` on the CPU, with an activation of its own for each layer."""
    if torch.is_autocast_enabled("cpu") or not is_direct(input, *weights, *biases):
        return None
    return _C.mlp(input, weights, biases, activations)


def factors_of(own: torch.dtype) -> str | None:
    """What products with parameters of this dtype are formed of on CUDA at present: "bfloat16", "float16", "tf32" or
    "float32", as autocast and ``torch.backends.cuda.matmul`` say; None for what the kernels don't take."""
    if torch.is_autocast_enabled("cuda") and own is not torch.float64:
        own = torch.get_autocast_dtype("cuda")
    if own is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return _FACTORS.get(own)
