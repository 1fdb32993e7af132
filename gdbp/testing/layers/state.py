"""Checks of a layer's state: checkpoints, copies, replaced parameters, the meta device, parametrizations."""

import copy
import inspect
import io
import pickle

import torch
from torch.nn.utils import parametrizations

from gdbp.testing.compare import require, same_bits
from gdbp.testing.layers.subject import SUITE, Subject, trained
from gdbp.testing.report import NotApplicable


def _moved(subject: Subject, rng: torch.Generator):
    """A layer whose parameters and buffers are no longer those of a new one; input and gradient."""
    layer, x = subject.make(), subject.input(rng)
    with torch.no_grad():
        for p in trained(layer).values():
            p.add_(torch.randn(p.shape, generator=rng))
    g = subject.gradient(x, rng)
    subject.run(layer, x, g)
    return layer, x, g


def _require_none_shared(layer: torch.nn.Module) -> None:
    """torch gives every module a parameter of its own where it assigns new ones."""
    if len(list(layer.parameters())) < len(list(layer.named_parameters(remove_duplicate=False))):
        raise NotApplicable("modules share a parameter")


@SUITE.check("checkpoint")
def checkpoint(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _moved(subject, rng)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = subject.construct(seed=2).train(layer.training)  # with other values wherever it keeps them
    missing, unexpected = other.load_state_dict(torch.load(file, weights_only=True))
    require(not missing and not unexpected, f"missing {missing}, unexpected {unexpected}")
    subject.run(other, x, g).require_same(subject.run(layer, x, g), "saved and loaded")
    return "saved, loaded into a new layer, same bits"


@SUITE.check("load with assign")
def load_assign(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _moved(subject, rng)
    _require_none_shared(layer)
    other = subject.make()
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    subject.run(other, x, g).require_same(subject.run(layer, x, g), "loaded by assignment")
    return "same bits"


@SUITE.check("deepcopy")
def deepcopied(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _moved(subject, rng)
    other = copy.deepcopy(layer)
    shared = {id(p) for p in layer.parameters()} & {id(p) for p in other.parameters()}
    require(not shared, "a copy shares parameters with the original")
    subject.run(other, x, g).require_same(subject.run(layer, x, g), "a copy")
    return "same bits, nothing shared"


@SUITE.check("pickle")
def pickled(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _moved(subject, rng)
    other = pickle.loads(pickle.dumps(layer))
    subject.run(other, x, g).require_same(subject.run(layer, x, g), "unpickled")
    return "same bits"


@SUITE.check("parameters replaced")
def replaced(subject: Subject, rng: torch.Generator) -> str:
    """Nothing of old parameters may be kept, however new ones come in."""
    ways = {
        "copy_": lambda module, name, p, value: p.copy_(value),
        ".data": lambda module, name, p, value: setattr(p, "data", value.clone()),
        "a new Parameter": lambda module, name, p, value: setattr(module, name, value),
    }
    if not trained(subject.make()):
        raise NotApplicable("no parameters")
    for how, put in ways.items():
        layer, x, g = _moved(subject, rng)
        source = subject.twin(layer, torch.float32)  # has seen no parameters but these
        with torch.no_grad():
            for p in trained(source).values():
                p.mul_(-0.5)
            for path, value in list(source.named_parameters(remove_duplicate=False)):
                owner, _, name = path.rpartition(".")
                module = layer.get_submodule(owner)
                put(module, name, getattr(module, name), value)
        found, expected = subject.run(layer, x, g), subject.run(source, x, g)
        found.require_same(expected, f"by {how}")
    return ", ".join(ways)


@SUITE.check("other dtypes and back")
def converted(subject: Subject, rng: torch.Generator) -> str:
    layer, x, g = _moved(subject, rng)
    expected = subject.run(subject.twin(layer, torch.float32), x, g)
    training = layer.training
    layer.eval().double()(x.double())  # in training it might move buffers
    subject.run(layer.float().train(training), x, g).require_same(expected, "float32, float64 and back")
    return "float32, float64 and back, same bits"


@SUITE.check("device and dtype arguments")
def factory(subject: Subject, rng: torch.Generator) -> str:
    accepted = inspect.signature(subject.cls).parameters
    given = [name for name in ("device", "dtype") if name in accepted and name not in subject.kwargs]
    if given != ["device", "dtype"]:
        raise NotApplicable("no device and dtype arguments")
    for name, p in subject.construct(dtype=torch.float64).named_parameters():
        require(p.dtype == torch.float64 or not p.is_floating_point(), f"dtype=float64: {name} is {p.dtype}")
    _require_none_shared(subject.make())
    empty = subject.construct(device="meta")
    tensors = [*empty.parameters(), *empty.buffers()]
    require(all(t.device.type == "meta" for t in tensors), "device='meta': a parameter or buffer is elsewhere")
    made = subject.make()
    empty.to_empty(device="cpu").train(made.training).load_state_dict(made.state_dict())
    x = subject.input(rng)
    g = subject.gradient(x, rng)
    subject.run(empty, x, g).require_same(subject.run(made, x, g), "made on meta and loaded")
    return "float64; meta, then loaded"


@SUITE.check("same seed, same parameters")
def seeded(subject: Subject, rng: torch.Generator) -> str:
    a, b = subject.make(), subject.make()
    if not any(True for _ in a.parameters()):
        raise NotApplicable("no parameters")
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        require(same_bits(p.detach(), q.detach()), f"{name} differs")
        require(bool(p.isfinite().all()), f"{name} is not finite")
    return f"{sum(p.numel() for p in a.parameters())} numbers"


@SUITE.check("parametrizations")
def parametrized(subject: Subject, rng: torch.Generator) -> str:
    """Of a weight that is computed from others, gradients must reach these."""
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64)
    found = [
        (m, n) for m in layer.modules() for n, p in m.named_parameters(recurse=False) if p.requires_grad and p.ndim > 1
    ]
    if not found:
        raise NotApplicable("no matrix among the parameters")
    for module, name in found:
        parametrizations.weight_norm(module, name)
    g = subject.gradient(x, rng)
    gradients = subject.run(layer, x, g).tensors
    for module, name in found:
        torch.nn.utils.parametrize.remove_parametrizations(module, name)
    plain = subject.run(layer, x, g).tensors
    require(torch.allclose(gradients["output"], plain["output"]), "the output is not that of the computed weight")
    lost = [n for n, t in gradients.items() if n.endswith(("original0", "original1")) and not t.any()]
    require(not lost, f"no {', no '.join(lost)}")
    return f"weight_norm of {len(found)} weights: gradients reach magnitude and direction"
