"""A short run through every kernel, for compute-sanitizer: `python -m tests.cuda_cases [device [dtype ...]]`.

Sizes sit beside multiples of the vector width, of a warp and of a tile, where kernels go out of bounds. The
values are compared in the tests proper; here they must only be finite.
"""

import sys

import torch

from gdbp import TrainStep, nn, optim
from gdbp._load import available, reason
from gdbp.ops.linear import ACTIVATIONS

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (3, 33, 7), (65, 20, 129))  # rows, in_features, out_features
OPTIMIZERS = (
    lambda p: optim.SGD(p, lr=0.01),
    lambda p: optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    lambda p: optim.Adam(p, amsgrad=True, weight_decay=0.1),
    lambda p: optim.AdamW(p),
)


def layers_and_losses(device: str, dtype: torch.dtype) -> None:
    for rows, features, classes in SHAPES:
        x = torch.randn(rows, features, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(classes, (rows,), device=device)
        for activation in ACTIVATIONS:
            name = None if activation == "none" else activation
            layer = nn.Linear(features, classes, activation=name, device=device, dtype=dtype)
            norm = nn.BatchNorm1d(classes, activation=name, device=device, dtype=dtype).train(rows > 1)
            for reduction in ("none", "mean", "sum"):
                output = norm(layer(x)) + norm(layer(x).unsqueeze(2).expand(-1, -1, 3)).sum(2)
                loss = nn.CrossEntropyLoss(reduction=reduction, label_smoothing=0.1)(output, labels)
                other = nn.CrossEntropyLoss(reduction=reduction, z_loss=0.01, softcap=9.0)
                for target in ((labels, labels.flip(0), 0.3), torch.rand_like(output)):
                    loss = loss.sum() + other(output, target).sum()
                across = torch.stack((output, output), 2)
                loss = loss.sum() + other(across, torch.stack((labels, labels), 1)).sum()
                for of_elements in (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCEWithLogitsLoss):
                    loss = loss.sum() + of_elements(reduction=reduction)(output, torch.zeros_like(output)).sum()
                loss.backward()
        head = nn.LinearCrossEntropyLoss(features, classes, bias=True, device=device, dtype=dtype)
        head(x, labels).backward()
        assert torch.isfinite(x.grad).all()


def rows_of_many_classes(device: str, dtype: torch.dtype) -> None:
    """Of a block, small and large, with the gradient from the forward pass and from another."""
    for rows, classes in ((300, 40), (3, 1029), (2, 70003)):
        logits = torch.randn(rows, classes, device=device, dtype=dtype, requires_grad=True)
        labels = torch.randint(classes, (rows,), device=device)
        for upstream in (1, 2):
            (nn.functional.cross_entropy(logits, labels) * upstream).backward()
        nn.functional.cross_entropy(logits * 2, labels, inplace_backward=True).backward()
        assert torch.isfinite(logits.grad).all()


def optimizers(device: str, dtype: torch.dtype) -> None:
    for make in OPTIMIZERS:
        params = [torch.randn(n, device=device, dtype=dtype, requires_grad=True) for n in (1, 7, (3, 33), 1025, 70001)]
        optimizer = make(params)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn_like(p)
            nn.utils.clip_grad_norm_(params, 1.0)
            nn.utils.clip_grad_value_(params, 0.1)
            nn.utils.clip_grad_norm_by_group_([params[:2], params[2:]], 1.0)
            nn.utils.adaptive_clip_grad_(params, 0.1)
            nn.utils.penalty(params, l1=1e-3, l2=1e-3).backward()
            optimizer.step()
        str(nn.utils.gradient_health(enumerate(params)))
        assert all(torch.isfinite(p).all() for p in params)


def whole_networks(device: str, dtype: torch.dtype) -> None:
    """In one kernel: sums in shared memory and beside it, one tile and several. No graphs, which compute-sanitizer does
    not let be recorded: of float32 the widest network would be one."""
    cases = ((3, 2), 1), ((33, 20, 17, 5), 300), ((64, 64, 64, 10), 129), ((128, 128, 128, 128, 7), 200)
    for sizes, rows in cases[:-1] if dtype is torch.float32 else cases:
        for activation in ("relu", "silu"):
            model = nn.MLP(sizes, activation, device=device, dtype=dtype)
            x = torch.randn(rows, sizes[0], device=device, dtype=dtype)
            with torch.no_grad():
                assert torch.isfinite(model(x)).all()
            model(x.requires_grad_()).sum().backward()
            assert torch.isfinite(x.grad).all()
            x = x.detach()
            labels = torch.randint(sizes[-1], (rows,), device=device)
            values = torch.rand(rows, sizes[-1], device=device)
            for loss, target in ((nn.CrossEntropyLoss(), labels), (nn.MSELoss(), values.to(dtype))):
                for options in ({}, {"max_grad_norm": 1.0}):
                    step = TrainStep(model, loss, optim.AdamW(model.parameters()), **options)
                    assert all(torch.isfinite(step(x, target)) for _ in range(2))


def main(device: str = "cuda", *dtypes: str) -> None:
    if not available:
        raise SystemExit(f"cuda_cases: {reason}; there is no kernel to check")
    torch.manual_seed(0)
    for dtype in (getattr(torch, name) for name in dtypes) if dtypes else DTYPES:
        layers_and_losses(device, dtype)
        rows_of_many_classes(device, dtype)
        optimizers(device, dtype)
        if dtype is not torch.float64 and device != "cpu":
            for precision in ("ieee", "tf32") if dtype is torch.float32 else ("ieee",):
                torch.backends.cuda.matmul.fp32_precision = precision
                whole_networks(device, dtype)
    print(f"cuda_cases: all cases ran on {device}")


if __name__ == "__main__":
    main(*sys.argv[1:])
