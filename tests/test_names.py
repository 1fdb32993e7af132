"""A script that changes an import finds all of torch's names: ours where there is one, else torch's own."""

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
