"""A model as the list of layers that the compiled step runs (csrc/step/train.cpp: make_layers)."""

from dataclasses import dataclass, field

import torch

from gdbp import nn
from gdbp.fusion.classes import class_of
from gdbp.step._watch import CannotFuse, Watch


@dataclass
class Layers:
    """What a model comes down to.

    Args:
        found: (kind, label, options...), see ``make_layers``.
        flattens: whether a first Flatten takes input of any number of dimensions.
        output_dims: of the output; 1 after a last ``Flatten(0)``.
    """

    found: list[tuple] = field(default_factory=list)
    flattens: bool = False
    output_dims: int = 2
    watch: Watch = field(default_factory=Watch)

    def add(self, module: torch.nn.Module, name: str) -> None:
        """Takes a module in, with all that is inside.

        Raises:
            CannotFuse: names the module that has no fused form.
        """
        kind = class_of(module)  # gdbp.fuse changes how layers are called, not what they compute
        label = f"{kind.__name__} '{name}'" if name else kind.__name__
        if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
            raise CannotFuse(f"{label} has no parameters yet; call the model once with a batch")
        read = _READERS.get(kind.forward)
        if read is None:
            raise CannotFuse(
                f"{label} has no fused form; expected Sequential or MLP of Linear, BatchNorm1d, activations, Dropout, "
                f"Flatten and Identity{_remedy(module)}"
            )
        if self.output_dims == 1:
            raise CannotFuse(
                f"{label} comes after a Flatten that joins rows; expected that to be the last layer; use strict=False"
            )
        self.watch.module(module, label)
        read(self, module, label, name)

    def activate(self, activation: str, label: str) -> None:
        """The activation joins the layer before it where that has arithmetic and no activation yet."""
        last = self.found[-1] if self.found else ("",)
        if last[0] in ("linear", "batch_norm") and last[-1] == "none":
            self.found[-1] = (*last[:-1], activation)
        else:
            self.found.append(("activation", label, activation))


def _remedy(module: torch.nn.Module) -> str:
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        return "; pass its .module, and process_group= to sum the gradients"
    if hasattr(module, "_orig_mod"):
        return "; pass the model that torch.compile was given"
    return "; use strict=False to run such models eagerly"


# ---- one reader for each forward: subclasses that inherit it do what it does ----


def _sequential(layers: Layers, module, label, name):
    for key, child in module._modules.items():
        layers.add(child, f"{name}.{key}" if name else key)


def _linear(layers: Layers, module, label, name):
    weight, bias = layers.watch.tensor(module, "weight", label), layers.watch.tensor(module, "bias", label)
    is_ours = class_of(module).forward is nn.Linear.forward
    activation = layers.watch.option(module, "activation") if is_ours else None
    layers.found.append(("linear", label, weight, bias, activation or "none"))


def _batch_norm(layers: Layers, module, label, name):
    if not isinstance(module, torch.nn.BatchNorm1d):
        raise CannotFuse(f"{label} normalises images; expected BatchNorm1d{_remedy(module)}")
    option = lambda name: layers.watch.option(module, name)  # noqa: E731
    tensor = lambda name: layers.watch.tensor(module, name, label)  # noqa: E731
    training, tracks, momentum = option("training"), option("track_running_stats"), option("momentum")
    keeps = training and tracks
    mean, variance = tensor("running_mean"), tensor("running_var")
    batches = tensor("num_batches_tracked")
    if training and not tracks:
        mean = variance = None
    of_batch = training or mean is None
    if not keeps or mean is None:
        batches = None
    elif momentum is None and batches is None:
        momentum = 0.0  # without a momentum and without a count the running statistics stay
    if momentum is not None:
        momentum = float(momentum)
    activation = option("activation") if class_of(module).forward is nn.BatchNorm1d.forward else None
    layers.found.append(
        (
            "batch_norm", label, module.num_features, tensor("weight"), tensor("bias"), mean, variance, batches,
            float(option("eps")), momentum, of_batch, activation or "none",
        )
    )  # fmt: skip


def _dropout(layers: Layers, module, label, name):
    p = layers.watch.option(module, "p")
    if layers.watch.option(module, "training") and p > 0:
        layers.found.append(("dropout", label, float(p)))


def _flatten(layers: Layers, module, label, name):
    start, end = layers.watch.option(module, "start_dim"), layers.watch.option(module, "end_dim")
    if (start, end) == (0, -1):
        layers.output_dims = 1
    elif (start, end) != (1, -1):
        raise CannotFuse(
            f"{label} flattens dimensions {start} to {end}; expected 1 to -1, or 0 to -1 at the end; use strict=False"
        )
    elif not layers.found:
        layers.flattens = True


def _identity(layers: Layers, module, label, name):
    pass


def _activation(activation: str, **expected):
    """A reader for a torch activation whose options have to be what ours means by the name."""

    def read(layers: Layers, module, label, name):
        for option, value in expected.items():
            found = layers.watch.option(module, option)
            if found != value:
                raise CannotFuse(f"{label} has {option}={found!r}; expected {value!r}; use strict=False")
        layers.activate(activation, label)

    return read


def _gelu(layers: Layers, module, label, name):
    approximate = layers.watch.option(module, "approximate")
    layers.activate("gelu_tanh" if approximate == "tanh" else "gelu", label)


_READERS = {
    torch.nn.Sequential.forward: _sequential,
    nn.MLP.forward: _sequential,
    torch.nn.Linear.forward: _linear,
    nn.Linear.forward: _linear,
    torch.nn.BatchNorm1d.forward: _batch_norm,
    nn.BatchNorm1d.forward: _batch_norm,
    torch.nn.Dropout.forward: _dropout,
    torch.nn.Flatten.forward: _flatten,
    torch.nn.Identity.forward: _identity,
    torch.nn.ReLU.forward: _activation("relu"),
    torch.nn.LeakyReLU.forward: _activation("leaky_relu", negative_slope=0.01),
    torch.nn.GELU.forward: _gelu,
    torch.nn.SiLU.forward: _activation("silu"),
    torch.nn.Sigmoid.forward: _activation("sigmoid"),
    torch.nn.Tanh.forward: _activation("tanh"),
    torch.nn.ELU.forward: _activation("elu", alpha=1.0),
    torch.nn.Softplus.forward: _activation("softplus", beta=1.0, threshold=20.0),
}
