"""Batch normalisation."""

import sys

import torch

from gdbp.nn._arguments import check_activation
from gdbp.nn._batch_norm import activate, normalize_by
from gdbp.nn._observe import as_leaf, observers, tell
from gdbp.nn._twin import Twin


class _Activated:
    """A batch norm with an activation behind it."""

    activation: str | None

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation is None else f", activation={self.activation!r}")

    @property
    def qconfig(self):
        """What torch.ao may have set. torch's conversion to SyncBatchNorm, which copies a layer into another class,
        asks for it as well: the only place to tell it that there is an activation to lose."""
        if "qconfig" in self.__dict__:
            return self.__dict__["qconfig"]
        caller = sys._getframe(1).f_code.co_name
        if caller == "convert_sync_batchnorm" and self.activation is not None:
            raise RuntimeError(
                f"this {type(self).__name__} has activation={self.activation!r}, which torch's conversion would lose; "
                "use gdbp.nn.SyncBatchNorm.convert_sync_batchnorm"
            )
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value):
        self.__dict__["qconfig"] = value

    @qconfig.deleter
    def qconfig(self):
        del self.__dict__["qconfig"]


class BatchNorm1d(_Activated, torch.nn.BatchNorm1d, metaclass=Twin):
    """Batch normalisation of each channel, and the activation that follows it, in one layer.

    A ``torch.nn.BatchNorm1d`` in every respect (parameters, buffers, state_dict, ``update_bn``), with the activation
    computed in the pass that normalises. The formula is that of :func:`gdbp.nn.functional.batch_norm`. What puts
    something else in the place of a batch norm, as ``torch.nn.utils.fuse_linear_bn_eval`` does, knows nothing of the
    activation.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: share of the batch in the running statistics; None makes them the mean over all batches.
        affine: whether to learn a weight and a bias of shape (C,).
        track_running_stats: whether to keep running statistics, for evaluation.
        device, dtype: of parameters and buffers; float64, float32, bfloat16 or float16.
        activation: None, or a name: "relu", "gelu", ..., see :func:`gdbp.nn.functional.linear`.
        bias: whether ``affine`` learns a bias, in versions of torch that know this option.

    Shape:
        input (N, C) or (N, C, L), output the same.

    Raises:
        RuntimeError: from ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, which would lose the activation; call
            that of ``gdbp.nn.SyncBatchNorm``.
        ValueError: for an unknown activation, another number of dimensions, or one value for each channel in
            training.
    """

    _torchs = torch.nn.BatchNorm1d

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
        bias: bool = True,
    ):
        check_activation(activation)
        options = {} if bias else {"bias": False}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if isinstance(input, torch.fx.Proxy):
            call = as_leaf(self, input)
            return activate(super().forward(input), self.activation) if call is None else call
        output = normalize_by(self, input, self.activation)
        if observers:
            tell((self,), self.activation, output)
        return output


class SyncBatchNorm(_Activated, torch.nn.SyncBatchNorm, metaclass=Twin):
    """``torch.nn.SyncBatchNorm``, computed by torch, followed by an activation.

    Args:
        activation: None, or a name, see :func:`gdbp.nn.functional.linear`. All others are torch's.
    """

    _torchs = torch.nn.SyncBatchNorm

    def __init__(self, *args, activation: str | None = None, **options):
        check_activation(activation)
        super().__init__(*args, **options)
        self.activation = activation

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = activate(super().forward(input), self.activation)
        if observers:
            tell((self,), self.activation, output)
        return output

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group=None) -> torch.nn.Module:
        """torch's conversion of every BatchNorm layer in ``module``, which keeps the activations of ours."""
        activation = module.activation if isinstance(module, _Activated) else None
        if activation is None:
            return super().convert_sync_batchnorm(module, process_group)
        module.activation = None
        try:
            converted = super().convert_sync_batchnorm(module, process_group)
        finally:
            module.activation = activation
        # Made by torch, which knows no class of ours.
        converted.__class__, converted.activation = cls, activation
        return converted
