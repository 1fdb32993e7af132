"""Dropout by a seed."""

import pytest
import torch

from gdbp import _load
from gdbp.ops import dropout

pytestmark = pytest.mark.skipif(not _load.available, reason="what is tested is the compiled part")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def seeded(number, device="cpu"):
    return torch.tensor(number, device=device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mask(dtype, device):
    """As many are dropped as should be, the others scaled; other masks for other seeds and layers; whatever the strides
    and the device."""
    x = torch.randn(500, 40).to(dtype)
    y = dropout(x.to(device), 0.3, seeded(5, device), 1).cpu()
    kept = y != 0
    assert abs(kept.double().mean() - 0.7) < 4 * (0.21 / x.numel()) ** 0.5
    expected = (x.to(torch.float64 if dtype is torch.float64 else torch.float32) * (1 / 0.7)).to(dtype)
    assert torch.equal(y, torch.where(kept, expected, 0))
    assert torch.equal(y, dropout(x, 0.3, seeded(5), 1))
    for seed, layer in ((6, 1), (5, 2), (-5, 1)):
        other = dropout(x.to(device), 0.3, seeded(seed, device), layer).cpu() != 0
        assert 0.3 < (other != kept).double().mean() < 0.54  # independent: 2 * 0.3 * 0.7
    strided = x.to(device).t().contiguous().t()
    assert torch.equal(y, dropout(strided, 0.3, seeded(5, device), 1).cpu())


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 5)])
def test_ends_and_shapes(p, shape, device):
    x = torch.randn(shape, device=device)
    y = dropout(x, p, seeded(1, device), 0)
    assert torch.equal(y, torch.zeros_like(x) if p else x)


def test_derivatives():
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropout, (x, 0.4, seeded(3), 2))
    assert torch.autograd.gradgradcheck(dropout, (x, 0.4, seeded(3), 2))
    (grad,) = torch.autograd.grad(dropout(x, 0.4, seeded(3), 2).sum(), x)
    assert torch.equal(grad != 0, dropout(x, 0.4, seeded(3), 2) != 0)
    torch.library.opcheck(torch.ops.gdbp.dropout, (torch.randn(6, 5).t(), 0.4, seeded(3), 2))


def test_refuses():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"p is 1\.5; expected a probability from 0 to 1"):
        dropout(x, 1.5, seeded(1), 0)
    for seed in (torch.tensor(1.0), torch.tensor([1, 2])):
        with pytest.raises(RuntimeError, match=r"seed has dtype .* expected one int64 number on cpu"):
            dropout(x, 0.5, seed, 0)
    with pytest.raises(TypeError, match="input has dtype"):
        dropout(torch.ones(3, dtype=torch.int64), 0.5, seeded(1), 0)
