"""Initial weights: torch's initialisers under the same names, and :func:`init_` for a whole network.

A layer that multiplies the variance of its signal by 1.5 multiplies it by 57 over ten layers. Both schemes
choose the spread of the weights so that the factor is near 1:

=============================  ==============================================  ===============================
scheme                         weights drawn from                              paper
=============================  ==============================================  ===============================
``xavier``, ``xavier_uniform`` uniform, variance gain**2 * 2/(fan_in+fan_out)  Glorot and Bengio, 2010
``xavier_normal``              normal, the same variance
``he``, ``he_normal``          normal, variance gain**2 / fan_in               He, Zhang, Ren and Sun, 2015
``he_uniform``                 uniform, the same variance
=============================  ==============================================  ===============================

The short names stand for the form that each paper used: Glorot and Bengio drew uniform weights, He and others
normal ones.
"""

from functools import partial

import torch
from torch.nn.init import (
    calculate_gain,
    constant_,
    dirac_,
    eye_,
    kaiming_normal_,
    kaiming_uniform_,
    normal_,
    ones_,
    orthogonal_,
    sparse_,
    trunc_normal_,
    uniform_,
    xavier_normal_,
    xavier_uniform_,
    zeros_,
)
from torch.nn.parameter import UninitializedParameter

from gdbp._rest import rest_of
from gdbp.nn._arguments import check_module

__all__ = [
    "SCHEMES",
    "calculate_gain",
    "constant_",
    "dirac_",
    "eye_",
    "gain",
    "init_",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "sparse_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]

# Activations that torch's calculate_gain does not know: 1 / sqrt(E[f(z)**2]) for a standard normal z, the
# rule that also gives relu its sqrt(2).
_GAINS = {"gelu": 1.5335, "gelu_tanh": 1.5336, "silu": 1.6765, "elu": 1.2452, "softplus": 1.0419}


_EMBEDDINGS = (torch.nn.Embedding, torch.nn.EmbeddingBag)
_NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)

_he_normal_ = partial(kaiming_normal_, nonlinearity="linear")
_he_uniform_ = partial(kaiming_uniform_, nonlinearity="linear")

# At gain 1; init_ multiplies by the gain afterwards, since kaiming_*_ know only the nonlinearities of torch.
SCHEMES = {
    "xavier": xavier_uniform_,
    "xavier_uniform": xavier_uniform_,
    "xavier_normal": xavier_normal_,
    "he": _he_normal_,
    "he_normal": _he_normal_,
    "he_uniform": _he_uniform_,
}


def gain(nonlinearity: str | None) -> float:
    """The factor by which weights must grow to make up for what ``nonlinearity`` takes from the signal.

    torch's :func:`calculate_gain` for the names it knows (``linear`` 1, ``relu`` sqrt(2), ``tanh`` 5/3,
    ``sigmoid`` 1, ``leaky_relu``, ``selu``, ...); for ``gelu``, ``gelu_tanh``, ``silu``, ``elu`` and
    ``softplus`` it is ``1 / sqrt(E[f(z)**2])`` with z standard normal. ``None`` means ``linear``.
    Raises ValueError for any other name.
    """
    if nonlinearity is None:
        return 1.0
    if not isinstance(nonlinearity, str):
        raise ValueError(f"nonlinearity is {nonlinearity!r}; expected None or a name such as linear, relu, tanh")
    if nonlinearity in _GAINS:
        return _GAINS[nonlinearity]
    try:
        return float(calculate_gain(nonlinearity))
    except ValueError:
        raise ValueError(
            f"nonlinearity {nonlinearity!r} is unknown; expected one such as linear, relu, tanh, sigmoid, "
            f"{', '.join(_GAINS)}"
        ) from None


def init_(
    module: torch.nn.Module,
    scheme: str = "he",
    *,
    nonlinearity: str | None = "relu",
    generator: torch.Generator | None = None,
) -> torch.nn.Module:
    """Draws new weights for ``module`` and its children in place, sets their biases to 0, and returns it.

    Every parameter with "weight" in its name and two or more dimensions is drawn (linear, convolutional and
    recurrent layers; gdbp's or torch's); every parameter with "bias" in its name becomes 0. The weights of
    normalisation layers, the magnitudes of ``torch.nn.utils.weight_norm``, and embeddings, which are looked up and
    have no fan (also where a layer shares them), stay as they are.

    Args:
        module: any ``torch.nn.Module`` with at least one such weight, on any device, of any floating dtype.
        scheme: ``he`` (default; the same as ``he_normal``), ``he_uniform``, ``xavier`` (the same as
            ``xavier_uniform``) or ``xavier_normal``; see the table above.
        nonlinearity: the activation that follows the layers, which sets the gain; see :func:`gain`.
        generator: source of the random numbers, on the device of the weights; default torch's global one.

    Raises:
        ValueError: unknown scheme or nonlinearity, all-zero weights asked for, no weight found, or one without a
            shape yet. Nothing is changed then.
        TypeError: module is none.
    """
    if scheme in ("zero", "zeros", "constant", "ones"):
        raise ValueError(
            f"scheme {scheme!r} is refused: with equal weights all units of a layer get the same gradient "
            f"and stay copies of one another, the symmetry is never broken; use one of {', '.join(SCHEMES)}"
        )
    if not isinstance(scheme, str) or scheme not in SCHEMES:
        raise ValueError(f"scheme {scheme!r} is unknown; expected one of {', '.join(SCHEMES)}")
    fill_, factor = SCHEMES[scheme], gain(nonlinearity)
    check_module("module", module)
    embeddings = {layer.weight for layer in module.modules() if isinstance(layer, _EMBEDDINGS)}
    parameters = [
        (name, parameter)
        for layer in module.modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter not in embeddings
    ]
    for name, parameter in parameters:
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(f"a {name} of {type(module).__name__} has no shape yet; call the module once before")
    norms = {p for layer in module.modules() if isinstance(layer, _NORMS) for p in layer.parameters(recurse=False)}
    weights = [
        parameter
        for name, parameter in parameters
        if "weight" in name and parameter.ndim >= 2 and parameter not in norms and not name.endswith("_g")
    ]
    for weight in weights:
        if not weight.is_floating_point():
            raise ValueError(f"a weight of {type(module).__name__} is {weight.dtype}; expected floating dtypes")
    if not weights:
        raise ValueError(
            f"module {type(module).__name__} has no weight of two or more dimensions; expected a "
            "network with at least one linear or convolutional layer"
        )
    for weight in weights:
        fill_(weight, generator=generator)
        with torch.no_grad():
            weight.mul_(factor)
    for name, parameter in parameters:
        if "bias" in name and not ("weight" in name and parameter.ndim >= 2):
            zeros_(parameter)
    return module


__getattr__, __dir__ = rest_of(__name__, torch.nn.init)
