"""Losses as modules: torch.nn's classes with our functions inside."""

import math

import torch

from gdbp.nn import functional as F
from gdbp.nn._arguments import check_tensors, number, whole
from gdbp.nn._twin import Twin


def _extras(module: torch.nn.Module, **usual: object) -> str:
    """Those of the module's options that are not what they usually are."""
    return ", ".join(f"{name}={getattr(module, name)!r}" for name in usual if getattr(module, name) != usual[name])


class MSELoss(torch.nn.MSELoss, metaclass=Twin):
    """Mean squared error: ``(input - target)**2`` averaged, summed (``reduction="sum"``) or as is ("none").

    Input and target of any one shape; see :func:`gdbp.nn.functional.mse_loss`.
    """

    _torchs = torch.nn.MSELoss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss, metaclass=Twin):
    """Mean absolute error; see :func:`gdbp.nn.functional.l1_loss`."""

    _torchs = torch.nn.L1Loss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.l1_loss(input, target, reduction=self.reduction)


class HuberLoss(torch.nn.HuberLoss, metaclass=Twin):
    """Quadratic up to an error of ``delta`` (default 1), linear beyond; see :func:`gdbp.nn.functional.huber_loss`."""

    _torchs = torch.nn.HuberLoss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class SmoothL1Loss(torch.nn.SmoothL1Loss, metaclass=Twin):
    """Absolute error, quadratic below ``beta`` (default 1); see :func:`gdbp.nn.functional.smooth_l1_loss`."""

    _torchs = torch.nn.SmoothL1Loss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss, metaclass=Twin):
    """Binary cross-entropy with logits, with torch's arguments (weight, reduction, pos_weight) and its buffers
    ``weight`` and ``pos_weight``; see :func:`gdbp.nn.functional.binary_cross_entropy_with_logits`.
    """

    _torchs = torch.nn.BCEWithLogitsLoss

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class CrossEntropyLoss(torch.nn.CrossEntropyLoss, metaclass=Twin):
    """Softmax cross-entropy of logits against labels, probabilities or mixtures, with torch's arguments (weight,
    ignore_index, reduction, label_smoothing) and its buffer ``weight``.

    ``z_loss``, ``softcap``, ``empty`` and ``inplace_backward`` are those of
    :func:`gdbp.nn.functional.cross_entropy`; ``normalizer`` is given with each call.
    """

    _torchs = torch.nn.CrossEntropyLoss

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        empty: str = "nan",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.empty, self.inplace_backward = z_loss, softcap, empty, inplace_backward

    def forward(
        self, input: torch.Tensor, target: torch.Tensor | F.Mixture, *, normalizer: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            normalizer=normalizer,
            empty=self.empty,
            inplace_backward=self.inplace_backward,
        )

    def extra_repr(self) -> str:
        return _extras(self, z_loss=0.0, softcap=None, empty="nan", inplace_backward=False)


class LinearCrossEntropyLoss(torch.nn.Module):
    """The last layer of a classifier and its loss in one module, which never holds all logits: torch 2.13's, with its
    arguments and its state_dict (``linear.weight``, ``linear.bias``, ``weight``), and for older torch too.

    ``z_loss``, ``softcap``, ``empty`` and ``memory_budget`` are those of
    :func:`gdbp.nn.functional.linear_cross_entropy`; ``normalizer`` is given with each call.

    Raises:
        RuntimeError: a class weight of another size, label_smoothing outside [0, 1]. ValueError: no classes.
        TypeError: a class weight that is no tensor, label_smoothing that is no number.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device=None,
        dtype=None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options=None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        empty: str = "nan",
        memory_budget: int | None = None,
    ) -> None:
        if (whole(num_classes) or 0) < 1:
            raise ValueError(f"num_classes is {num_classes!r}; expected a whole number, 1 or more")
        check_tensors(weight=weight)
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(f"expected weight shape to be {(num_classes,)}, got {tuple(weight.shape)}")
        if not 0 <= number("label_smoothing", label_smoothing) <= 1:
            raise RuntimeError(f"expected label_smoothing to be in range [0, 1], got {label_smoothing}")
        super().__init__()
        self.register_buffer("weight", weight)
        self.num_classes, self.out_features = num_classes, out_features
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options, self.memory_budget = options, memory_budget
        self.z_loss, self.softcap, self.empty = z_loss, softcap, empty
        outputs = math.prod(out_features, start=num_classes)
        self.linear = torch.nn.Linear(in_features, outputs, bias=bias, device=device, dtype=dtype)

    def forward(
        self, input: torch.Tensor, target: torch.Tensor | F.Mixture, *, normalizer: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        shape, bias = (self.num_classes, *self.out_features), self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            normalizer=normalizer,
            empty=self.empty,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        shape = f"in_features={self.linear.in_features}, num_classes={self.num_classes}"
        usual = {"out_features": (), "reduction": "mean", "ignore_index": None, "label_smoothing": 0.0, "options": None}
        extras = _extras(self, **usual, z_loss=0.0, softcap=None, empty="nan", memory_budget=None)
        return f"{shape}, {extras}" if extras else shape
