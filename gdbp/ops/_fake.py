"""Shapes and dtypes of every operator, without data, for torch.compile and torch.export."""

import torch


@torch.library.register_fake("gdbp::linear")
def _(input, weight, bias, activation):
    output = input.new_empty((*input.shape[:-1], weight.shape[0]))
    return output, torch.empty_like(output) if activation == "gelu" else input.new_empty((0,))


@torch.library.register_fake("gdbp::linear_backward")
def _(grad_output, input, weight, saved, activation, mask):
    return (
        input.new_empty(input.shape) if mask[0] else None,
        weight.new_empty(weight.shape) if mask[1] else None,
        weight.new_empty((weight.shape[0],)) if mask[2] else None,
    )


@torch.library.register_fake("gdbp::mse_loss")
def _(input, target, reduction):
    return input.new_empty(input.shape if reduction == "none" else ())


@torch.library.register_fake("gdbp::mse_loss_backward")
def _(grad_output, input, target, reduction, mask):
    return tuple(input.new_empty(input.shape) if wanted else None for wanted in mask)


@torch.library.register_fake("gdbp::cross_entropy")
def _(logits, target, weight, reduction, ignore_index, label_smoothing):
    rows = logits.shape[0]
    compute = torch.float64 if logits.dtype is torch.float64 else torch.float32
    return (
        logits.new_empty((rows,) if reduction == "none" else ()),
        logits.new_empty((rows, 2), dtype=compute),
        logits.new_empty((), dtype=torch.float64),
    )


@torch.library.register_fake("gdbp::cross_entropy_backward")
def _(grad_output, logits, target, weight, stats, total_weight, reduction, ignore_index, label_smoothing):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("gdbp::optim_step_")
def _(params, grads, states, rule, hyper, counts):
    return None
