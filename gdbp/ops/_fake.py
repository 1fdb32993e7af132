"""Shapes and dtypes of every operator, without data, for torch.compile and torch.export."""

import math

import torch


def _check_devices(op, **tensors):
    """A meta tensor beside a real one leads here, and would leave the real one's result uninitialised."""
    (first, expected), *others = ((name, t.device) for name, t in tensors.items() if t is not None)
    for name, device in others:
        if device != expected:
            raise RuntimeError(
                f"{op}: {name} is on {device} and {first} on {expected}; expected the same device; "
                "move one of them with .to()"
            )


@torch.library.register_fake("gdbp::linear")
def _(input, weight, bias, activation):
    _check_devices("linear", input=input, weight=weight, bias=bias)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("gdbp::linear_with_pre")
def _(input, weight, bias, activation):
    _check_devices("linear", input=input, weight=weight, bias=bias)
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return output, torch.empty_like(output)


@torch.library.register_fake("gdbp::linear_backward_over_saved")
@torch.library.register_fake("gdbp::linear_backward")
def _(grad_output, input, weight, saved, activation, mask):
    _check_devices("linear_backward", grad_output=grad_output, input=input, weight=weight, saved=saved)
    return (
        input.new_empty(input.shape) if mask[0] else None,
        weight.new_empty(weight.shape) if mask[1] else None,
        weight.new_empty((weight.shape[0],)) if mask[2] else None,
    )


@torch.library.register_fake("gdbp::linear_wide_")
def _(output, input, weight, bias):
    _check_devices("linear_wide_", output=output, input=input, weight=weight, bias=bias)


@torch.library.register_fake("gdbp::mlp")
def _(input, weights, biases, activation, factors):
    _check_devices("mlp", input=input, weight=weights[0])
    dtype = getattr(torch, factors, torch.float32)  # tf32 is kept in float32
    return input.new_empty((*input.shape[:-1], weights[-1].shape[0]), dtype=dtype)


@torch.library.register_fake("gdbp::mlp_backward")
def _(grad_output, input, weights, biases, activation, factors, mask):
    _check_devices("mlp_backward", grad_output=grad_output, input=input, weight=weights[0])
    parameters = [t for pair in zip(weights, biases, strict=True) for t in pair]
    size = sum(p.numel() for p, m in zip(parameters, mask[1:], strict=True) if m and p is not None)
    return input.new_empty(input.shape) if mask[0] else None, input.new_empty((size,), dtype=torch.float32)


@torch.library.register_fake("gdbp::mlp_rows")
def _(input, weights, biases, activations, keeps):
    _check_devices("mlp_rows", input=input, weight=weights[0])
    rows, line = math.prod(input.shape[:-1]), 64 // input.element_size()
    # Hidden outputs, and pre-activations.
    kept = list(weights[:-1])
    kept += [w for w, a in zip(weights, activations, strict=True) if a in torch.ops.gdbp.activations_that_save("pre")]
    kept = sum((rows * w.shape[0] + 2 * line - 1) // line * line for w in kept) if keeps else 0
    return input.new_empty((*input.shape[:-1], weights[-1].shape[0])), input.new_empty((kept,))


@torch.library.register_fake("gdbp::mlp_rows_backward")
def _(grad_output, input, kept, output, weights, activations, mask):
    _check_devices("mlp_rows_backward", grad_output=grad_output, input=input, kept=kept, weight=weights[0])
    shapes = [input.shape, *(shape for w in weights for shape in (w.shape, w.shape[:1]))]
    return [input.new_empty(shape) for shape, m in zip(shapes, mask, strict=True) if m]


@torch.library.register_fake("gdbp::batch_norm")
def _(input, offset, weight, bias, running_mean, running_var, eps, activation):
    parameters = {"offset": offset, "weight": weight, "bias": bias}
    _check_devices("batch_norm", input=input, **parameters, running_mean=running_mean, running_var=running_var)
    return input.new_empty(input.shape), input.new_empty((2, input.shape[1]), dtype=torch.float64)


@torch.library.register_fake("gdbp::batch_norm_backward")
def _(grad_output, input, weight, bias, stats, of_batch, eps, activation, mask):
    _check_devices("batch_norm_backward", grad_output=grad_output, input=input, weight=weight, bias=bias)
    compute = torch.float64 if input.dtype is torch.float64 else torch.float32
    weight_type, bias_type = (compute if t is None else t.dtype for t in (weight, bias))
    return (
        input.new_empty(input.shape) if mask[0] else None,
        input.new_empty((input.shape[1],), dtype=weight_type) if mask[1] else None,
        input.new_empty((input.shape[1],), dtype=bias_type) if mask[2] else None,
    )


@torch.library.register_fake("gdbp::batch_norm_update_")
def _(running_mean, running_var, num_batches_tracked, stats, offset, elements, momentum):
    return None


@torch.library.register_fake("gdbp::pointwise_loss")
def _(input, target, kind, parameter, reduction):
    _check_devices(kind, input=input, target=target)
    return input.new_empty(input.shape if reduction == "none" else ())


@torch.library.register_fake("gdbp::pointwise_loss_with_gradient")
def _(input, target, kind, parameter, reduction):
    _check_devices(kind, input=input, target=target)
    return input.new_empty(()), input.new_empty(input.shape)


@torch.library.register_fake("gdbp::pointwise_loss_backward")
def _(grad_output, input, target, kind, parameter, reduction, mask):
    _check_devices(f"{kind}_backward", grad_output=grad_output, input=input, target=target)
    return tuple(input.new_empty(input.shape) if wanted else None for wanted in mask)


@torch.library.register_fake("gdbp::pointwise_loss_backward_from_one_")
def _(grad_output, input, target, kind, parameter, reduction, grad_input):
    _check_devices(f"{kind}_backward_from_one_", grad_output=grad_output, input=input, target=target)


@torch.library.register_fake("gdbp::bce_with_logits")
def _(input, target, weight, pos_weight, reduction):
    op = "binary_cross_entropy_with_logits"
    _check_devices(op, input=input, target=target, weight=weight, pos_weight=pos_weight)
    return input.new_empty(input.shape if reduction == "none" else ())


@torch.library.register_fake("gdbp::bce_with_logits_with_gradient")
def _(input, target, weight, pos_weight, reduction):
    op = "binary_cross_entropy_with_logits"
    _check_devices(op, input=input, target=target, weight=weight, pos_weight=pos_weight)
    return input.new_empty(()), input.new_empty(input.shape)


@torch.library.register_fake("gdbp::bce_with_logits_backward")
def _(grad_output, input, target, weight, pos_weight, reduction, mask):
    return tuple(input.new_empty(input.shape) if wanted else None for wanted in mask)


@torch.library.register_fake("gdbp::bce_with_logits_backward_from_one_")
def _(grad_output, input, target, weight, pos_weight, reduction, grad_input):
    op = "binary_cross_entropy_with_logits_backward_from_one_"
    _check_devices(op, grad_output=grad_output, input=input, target=target)


def _empty_like_logits(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of the shape and dtype of ``like``, with the classes last in memory where those of the logits are."""
    rows = like.movedim(1, -1)
    if not logits.is_contiguous() and logits.movedim(1, -1).is_contiguous():
        return like.new_empty(rows.shape).movedim(-1, 1)
    return like.new_empty(like.shape)


@torch.library.register_fake("gdbp::cross_entropy_with_gradient")
def _(logits, target, *others):
    return *_cross_entropy(logits, target, *others), _empty_like_logits(logits, logits)


@torch.library.register_fake("gdbp::cross_entropy")
def _cross_entropy(logits, target, second, share, weight, normalizer, reduction, *options):
    _check_devices("cross_entropy", logits=logits, target=target, second=second, share=share, weight=weight)
    shape = (logits.shape[0], *logits.shape[2:])
    compute = torch.float64 if logits.dtype is torch.float64 else torch.float32
    rows = logits.shape[0] * math.prod(logits.shape[2:])
    return (
        logits.new_empty(shape if reduction == "none" else ()),
        logits.new_empty((rows, 4 if target.is_floating_point() else 2), dtype=compute),
        logits.new_empty((), dtype=torch.float64),
    )


@torch.library.register_fake("gdbp::cross_entropy_backward")
def _(grad_output, logits, target, second, share, weight, stats, divisor, *options):
    _check_devices("cross_entropy_backward", logits=logits, grad_output=grad_output, target=target, weight=weight)
    mask = options[-1]
    with_target = mask[1] and target.is_floating_point()
    return (
        _empty_like_logits(logits, logits) if mask[0] else None,
        _empty_like_logits(logits, target) if with_target else None,
    )


@torch.library.register_fake("gdbp::cross_entropy_backward_")
def _(grad_output, logits, target, second, share, weight, stats, divisor, *options):
    _check_devices("cross_entropy_backward_", logits=logits, grad_output=grad_output, target=target, weight=weight)


@torch.library.register_fake("gdbp::cross_entropy_backward_from_one_")
def _(grad_output, logits, target, *others):
    _check_devices("cross_entropy_backward_from_one_", logits=logits, grad_output=grad_output, target=target)


@torch.library.register_fake("gdbp::dropout")
def _(input, p, seed, layer):
    _check_devices("dropout", input=input, seed=seed)
    return input.new_empty(input.shape)


@torch.library.register_fake("gdbp::unit_stats")
def _(output, low, high):
    return output.new_empty((3, output.shape[1]), dtype=torch.float64)


@torch.library.register_fake("gdbp::optim_step_")
def _(params, grads, states, counts, rule, hyper, lr, fresh, norm):
    return None
