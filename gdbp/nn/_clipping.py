"""Clipping that torch does not have: by the norms of layers, of groups, and of rows of a weight."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gdbp.nn._arguments import check_module, nonnegative
from gdbp.nn._gradients import collect, listed, order_of, said_of
from gdbp.ops._distributed import is_distributed, local

Group = Tensor | Iterable[Tensor] | dict[str, Any]


@torch.no_grad()
def clip_grad_norm_by_group_(
    groups: Iterable[Group],
    max_norm: float | Sequence[float] | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale the gradients of every group so that their norm together is at most ``max_norm``; returns the norms that
    the groups had.

    One read of all gradients, and a write of those groups that are too long, by ``max_norm / (norm + 1e-6)`` as
    :func:`clip_grad_norm_` does. A large gradient in one group does not shrink those of the others.

    Args:
        groups: each a parameter, an iterable of them, or a dict that has them under "params":
            ``optimizer.param_groups`` will do. Parameters without a gradient are passed over.
        max_norm: at least 0, one for all or one for each group (a sequence, a tensor or an array); ``inf`` only
            measures.
        norm_type: above 0, or ``inf`` for the largest absolute value.
        error_if_nonfinite: raise, before any change, where a norm is NaN or infinite; on CUDA this waits for it.

    Returns float64 of shape (groups,), on the gradients' device; 0 for a group without gradients. DTensors count with
    what all ranks have of them, and every rank must call this.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; says in which groups and gradients.
        ValueError: max_norm below 0, NaN, or not as many as groups; norm_type not above 0.
    """
    if isinstance(groups, Tensor | dict) or not isinstance(groups, Iterable):
        raise TypeError(f"groups is of type {type(groups).__name__}; expected groups; put a single one into a list")
    members = [_members(group, f"group {i}") for i, group in enumerate(groups)]
    return _clip_groups(members, [f"group {i}" for i in range(len(members))], max_norm, norm_type, error_if_nonfinite)


@torch.no_grad()
def clip_grad_norm_by_layer_(
    model: torch.nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """:func:`clip_grad_norm_by_group_` with the layers of a model as groups: the parameters that a module holds itself,
    such as a weight and its bias. One that several modules share belongs to the first.

    Args:
        max_norm: at least 0, for every layer.

    Returns for the name of each layer the norm that its gradients had, a 0-dim float64 tensor.

    Raises:
        RuntimeError: a norm that is not finite, with ``error_if_nonfinite``; names the layers.
        TypeError: model is no module.
        ValueError: max_norm below 0 or NaN, norm_type not above 0.
    """
    check_module("model", model)
    seen: set[Tensor] = set()
    layers: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if p not in seen]
        seen.update(own)
        if own:
            layers[name] = own
    norms = _clip_groups(list(layers.values()), list(layers), max_norm, norm_type, error_if_nonfinite)
    return dict(zip(layers, norms.unbind()))


@torch.no_grad()
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor], clip_factor: float = 0.01, eps: float = 1e-3, norm_type: float = 2.0
) -> None:
    """Adaptive gradient clipping (Brock et al., 2021, "High-Performance Large-Scale Image Recognition Without
    Normalization", equation 3): no unit's gradient is longer than ``clip_factor`` times its weight.

    A unit is a row of a parameter, ``p[i]``, as a rule the weights of one output; a parameter of one dimension, or
    none, is a single unit. Gradients of units whose norm is above ``clip_factor * max(norm of the weights, eps)`` are
    scaled down to it, the others are not written. The authors leave out the last layer of a classifier: do not pass
    its parameters.

    Args:
        parameters: those without a gradient are passed over.
        clip_factor: at least 0; larger batches want smaller ones, down to 0.01. ``inf`` clips nothing.
        eps: at least 0, the least norm of weights, so that units which begin at 0 can learn. ``inf`` clips nothing.
        norm_type: above 0, or ``inf``.

    Raises:
        ValueError: clip_factor or eps below 0 or NaN, norm_type not above 0.
    """
    clip_factor, eps = nonnegative("clip_factor", clip_factor), nonnegative("eps", eps)
    order = _order(norm_type)
    parameters = _with_gradients(listed(parameters))
    if math.inf in (clip_factor, eps):
        return
    gradients, weights = collect(parameters, by_row=True), collect(parameters, True, by_row=True)
    if gradients is not None and weights is not None:
        limits = weights.unit_norms(order).clamp_(min=eps).mul_(clip_factor)
        if gradients.scale_units(_coefficients(limits, gradients.unit_norms(order))):
            return
    _check_dense(parameters)
    for p in parameters:
        limits = _row_norms(p, order).clamp(min=eps) * clip_factor
        _multiply(p.grad, _coefficients(limits, _row_norms(p.grad, order)))


def _coefficients(limits: Tensor, norms: Tensor) -> Tensor:
    """``min(1, limit / norm)``. NaN stays; a gradient of 0 does, too."""
    return (limits / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)


def _row_norms(t: Tensor, order: float) -> Tensor:
    """Of every row, with as many dimensions as there were."""
    rows = list(range(1, t.dim())) or None
    return torch.linalg.vector_norm(t, order, dim=rows, keepdim=rows is not None, dtype=_wide(t))


def _wide(t: Tensor) -> torch.dtype:
    return torch.complex128 if t.is_complex() else torch.float64


def _order(norm_type: float) -> float:
    order = order_of(norm_type)
    if order is None:
        raise ValueError(f"norm_type is {norm_type}; expected a number above 0, or inf")
    return order


def _with_gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [p for p in parameters if p.grad is not None and p.grad.numel()]


def _check_dense(parameters: list[Tensor]) -> None:
    for p in parameters:
        if p.grad.layout is not torch.strided:
            raise TypeError(
                f"the gradient of a parameter of shape {tuple(p.shape)} is {p.grad.layout}; expected dense gradients; "
                "leave it out, or set p.grad = p.grad.to_dense()"
            )


def _members(group: Group, name: str) -> list[Tensor]:
    if isinstance(group, dict):
        if "params" not in group:
            raise ValueError(f"{name} is a dict of {list(group)}; expected its parameters under 'params'")
        group = group["params"]
    return listed(group, name)


def _clip_groups(
    groups: list[list[Tensor]], names: list[str], max_norm: float | Sequence[float], norm_type: float, check: bool
) -> Tensor:
    if getattr(max_norm, "shape", ()):
        max_norm = max_norm.tolist()
    limits = max_norm if isinstance(max_norm, Sequence) else [max_norm] * len(groups)
    limits = [nonnegative("max_norm", limit) for limit in limits]
    if len(limits) != len(groups):
        raise ValueError(f"max_norm has {len(limits)} numbers for {len(groups)} groups; expected one for each")
    order = _order(norm_type)
    groups = [_with_gradients(group) for group in groups]
    flat, counts = [p for group in groups for p in group], [len(group) for group in groups]
    if not flat:
        return torch.zeros(len(groups), dtype=torch.float64)
    gradients = collect(flat)
    if gradients is None:
        _check_dense(flat)
    each = _norms([p.grad for p in flat], order) if gradients is None else gradients.unit_norms(order)
    zero = each.new_zeros(1)
    # Every group ends with a 0, which changes no norm, and gives one to those that are empty.
    norms = torch.stack(torch._foreach_norm([torch.cat((part, zero)) for part in each.split(counts)], order))
    if check and not torch.isfinite(norms).all():
        raise RuntimeError(_nonfinite(norms, names, groups))
    if len(set(limits)) == 1:
        coefficients = _coefficients_of(norms, limits[0])
    else:
        coefficients = _coefficients_of(norms, torch.tensor(limits, dtype=torch.float64, device=norms.device))
    spread = torch.cat([c.expand(n) for c, n in zip(coefficients.unbind(), counts)])
    if gradients is None or not gradients.scale_units(spread):
        _scale(groups, coefficients)
    return norms


def _coefficients_of(norms: Tensor, limit: float | Tensor) -> Tensor:
    # inf / inf is NaN, and no limit is no change.
    ratio = (limit / (norms + 1e-6)).clamp(max=1.0)
    if isinstance(limit, Tensor):
        return torch.where(limit.isinf(), 1.0, ratio)
    return torch.ones_like(norms) if limit == float("inf") else ratio


def _scale(groups: list[list[Tensor]], coefficients: Tensor) -> None:
    for group, coefficient in zip(groups, coefficients.unbind()):
        for p in group:
            _multiply(local(p.grad), coefficient.to(p.grad.device))


def _multiply(gradient: Tensor, coefficients: Tensor) -> None:
    # On CUDA torch rounds a tensor of coefficients to a half type before it multiplies.
    if gradient.dtype in (torch.bfloat16, torch.float16):
        gradient.copy_(gradient.float().mul_(coefficients))
    else:
        gradient.mul_(coefficients)


def _norms(gradients: list[Tensor], order: float) -> Tensor:
    norms = [torch.linalg.vector_norm(g, order, dtype=_wide(g)) for g in gradients]
    norms = [n.full_tensor() if is_distributed(n) else n for n in norms]
    return torch.stack([n.to(norms[0].device) for n in norms])


def _nonfinite(norms: Tensor, names: list[str], groups: list[list[Tensor]]) -> str:
    said = []
    for norm, name, group in zip(norms.tolist(), names, groups):
        if norm == norm and norm != float("inf"):
            continue
        gradients = collect(group)
        what = said_of(gradients, group) if gradients is not None else []
        said.append(f"{name} has the norm {norm}" + (f" ({'; '.join(what)})" if what else ""))
    return (
        f"norms of gradients are not finite, so they cannot be clipped: {', '.join(said)}. To scale them by the "
        "non-finite norm anyway, set `error_if_nonfinite=False`"
    )
