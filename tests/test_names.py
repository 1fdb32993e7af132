"""A script that changes an import finds all of torch's names: ours where there is one, else torch's own."""

import abc
import types

import pytest
import torch

import gdbp

MODULES = {
    "nn": (gdbp.nn, torch.nn),
    "nn.functional": (gdbp.nn.functional, torch.nn.functional),
    "nn.init": (gdbp.nn.init, torch.nn.init),
    "nn.utils": (gdbp.nn.utils, torch.nn.utils),
    "optim": (gdbp.optim, torch.optim),
}


def is_ours(found):
    where = found.__name__ if isinstance(found, types.ModuleType) else found.__module__
    return where.startswith("gdbp.")


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name(name):
    ours, torchs = MODULES[name]
    names = [each for each in dir(torchs) if not each.startswith("_")]
    assert len(names) > 10 and set(names) <= set(dir(ours))
    for each in names:
        found, other = getattr(ours, each), getattr(torchs, each)
        assert found is other or is_ours(found), each


def test_ours_come_first():
    for module in (gdbp.nn, gdbp.optim):
        for name in module.__all__:
            assert is_ours(getattr(module, name)), name


@pytest.mark.parametrize("name", MODULES)
def test_what_nobody_has(name):
    ours, _ = MODULES[name]
    for unknown in ("Nothing", "_private"):
        with pytest.raises(AttributeError, match=f"module '{ours.__name__}' has no attribute '{unknown}'"):
            getattr(ours, unknown)


def of_script(nn):
    """What a script makes that imports nn: torch's layers inside torch's modules are initialised as its own are."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.ModuleList([nn.TransformerEncoder(encoder, 1), nn.LazyLinear(3), nn.Linear(8, 4), nn.LazyBatchNorm1d()])
    model[1](torch.zeros(2, 8)), model[3](torch.zeros(2, 8))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight)
        elif isinstance(module, (nn.BatchNorm1d, nn.LayerNorm)):
            nn.init.uniform_(module.weight)
    return model


def test_scripts_that_ask_for_a_class():
    torch.testing.assert_close(of_script(gdbp.nn).state_dict(), of_script(torch.nn).state_dict(), rtol=0, atol=0)


CLASSES = {name: found for name in gdbp.nn.__all__ if isinstance(found := getattr(gdbp.nn, name), type)}
TWINS = [name for name, found in CLASSES.items() if getattr(torch.nn, name, None) in found.__mro__]


@pytest.mark.parametrize("name", TWINS)
def test_torchs_class_is_ours_too(name):
    ours, torchs = getattr(gdbp.nn, name), getattr(torch.nn, name)

    class Mine(ours, abc.ABC):
        pass

    theirs = type("Theirs", (torchs,), {})
    module, other = object.__new__(torchs), object.__new__(torch.nn.Conv1d)
    assert issubclass(ours, torchs) and issubclass(torchs, ours) and issubclass(theirs, ours)
    assert issubclass(Mine, ours) and not issubclass(torchs, Mine) and not issubclass(torch.nn.Conv1d, ours)
    assert isinstance(module, ours) and not isinstance(module, Mine) and not isinstance(other, ours)
    assert isinstance(object.__new__(Mine), ours) and not isinstance(object.__new__(ours), Mine)


def test_compiled_forwards_that_ask_for_a_class():
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), gdbp.nn.Linear(3, 3), torch.nn.Identity()])

        def forward(self, x):
            for layer in self.layers:
                x = 2 * layer(x) if isinstance(layer, gdbp.nn.Linear) else layer(x)
            return x

    model, x = Scaled(), torch.randn(2, 3)
    first, second, _ = model.layers
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), 2 * second(2 * first(x)))


def test_optimizers_are_of_each_other_as_torchs_are():
    ours = [found for name in gdbp.optim.__all__ if hasattr(torch.optim, name) and (found := getattr(gdbp.optim, name))]
    for one in ours:
        for other in ours:
            theirs = getattr(torch.optim, one.__name__), getattr(torch.optim, other.__name__)
            assert issubclass(one, other) == issubclass(*theirs), (one, other)
