"""Checks of derivatives: against finite differences, by every way that torch has, and of parts alone."""

import re
import warnings

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, vmap

from gdbp.testing.compare import number, require
from gdbp.testing.layers.subject import SUITE, Run, Subject
from gdbp.testing.report import Failure, NotApplicable, one_line

_MOST = 400  # elements of an input
_MOST_ONE_BY_ONE = 200  # of all tensors; of more, finite differences are taken along random directions alone


def _function(subject: Subject, rng: torch.Generator):
    """The layer as a function of float64 tensors, which keeps no traces of calls, and such tensors by name, x first."""
    layer = subject.make(torch.float64)
    rows = max(2, min(subject.shape[0], _MOST // max(1, subject.input(rng, rows=1).numel())))
    parameters = dict(layer.named_parameters())
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def function(x, *values):
        state = dict(zip(parameters, values, strict=True)) | {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(layer, state, (subject.entering(x),))

    tensors = {"input": subject.input(rng, torch.float64, rows)}
    tensors |= {name: p.detach().clone() for name, p in parameters.items()}
    return function, {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _against_differences(check, subject: Subject, rng: torch.Generator, **options) -> None:
    function, tensors = _function(subject, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            fast = sum(t.numel() for t in tensors.values()) > _MOST_ONE_BY_ONE
            check(function, tuple(tensors.values()), fast_mode=fast, **options)
        except GradcheckError as error:
            # Up to the numbers, and with names.
            told = re.split(r",?\s*\bnumerical\b", str(error))[0]
            names = list(tensors)
            told = re.sub(r"with respect to input (\d+)", lambda found: f"for {names[int(found[1])]}", told)
            raise Failure(one_line(told)) from None


def _refused(error: Exception) -> NotApplicable:
    return NotApplicable(f"refused: {one_line(f'{type(error).__name__}: {error}')}")


@SUITE.check("gradcheck")
def first(subject: Subject, rng: torch.Generator) -> str:
    _against_differences(gradcheck, subject, rng)
    return "first derivatives of input and parameters"


@SUITE.check("gradgradcheck")
def second(subject: Subject, rng: torch.Generator) -> str:
    try:
        _against_differences(gradgradcheck, subject, rng)
    except RuntimeError as error:
        if "once_differentiable" in str(error) or "derivative for" in str(error):
            raise _refused(error) from None
        raise
    return "second derivatives"


@SUITE.check("forward mode")
def forward_mode(subject: Subject, rng: torch.Generator) -> str:
    try:
        _against_differences(
            gradcheck, subject, rng, check_forward_ad=True, check_backward_ad=False,
            check_undefined_grad=False, check_batched_grad=False,
        )  # fmt: skip
    except NotImplementedError as error:
        raise _refused(error) from None
    except RuntimeError as error:
        if "jvp" in str(error) or "forward AD" in str(error):
            raise _refused(error) from None
        raise
    return "tangents of input and parameters"


@SUITE.check("batched gradients")
def batched(subject: Subject, rng: torch.Generator) -> str:
    _against_differences(gradcheck, subject, rng, check_batched_grad=True)
    return "vmap over the backward pass"


@SUITE.check("Jacobian, both ways")
def jacobians(subject: Subject, rng: torch.Generator) -> str:
    function, tensors = _function(subject, rng)
    x, *values = (tensor.detach() for tensor in tensors.values())
    reverse = jacrev(function)(x, *values)
    try:
        forward = jacfwd(function)(x, *values)
    except (NotImplementedError, RuntimeError) as error:
        raise _refused(error) from None
    worst = (reverse - forward).abs().max().item()
    require(worst <= 1e-10 * max(1.0, reverse.abs().max().item()), f"they differ by up to {number(worst)}")
    return "torch.func.jacrev equals jacfwd"


@SUITE.check("per-sample gradients")
def per_sample(subject: Subject, rng: torch.Generator) -> str:
    """vmap of grad against one sample after the other."""
    layer = subject.make(torch.float64)
    state = {name: p.detach() for name, p in layer.named_parameters()}
    if not state:
        raise NotApplicable("no parameters")
    x = subject.input(rng, torch.float64)

    def loss(state, sample):
        return functional_call(layer, state, (subject.entering(sample[None]),)).square().sum()

    try:
        expected = [grad(loss)(state, sample) for sample in x]
        found = vmap(grad(loss), in_dims=(None, 0))(state, x)
    except (RuntimeError, ValueError) as error:
        if any(True for _ in layer.buffers()) or "more than 1 value" in str(error):
            raise NotApplicable(f"samples are not apart: {one_line(str(error))}") from None
        raise
    for name, tensor in found.items():
        other = torch.stack([one[name] for one in expected])
        worst = (tensor - other).abs().max().item()
        require(worst <= 1e-10 * max(1.0, other.abs().max().item()), f"{name}: they differ by up to {number(worst)}")
    return f"{len(x)} samples at once and one by one"


@SUITE.check("only what is asked for")
def asked_for(subject: Subject, rng: torch.Generator) -> str:
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64)
    g = subject.gradient(layer, x, rng)
    whole = subject.run(subject.twin(layer, torch.float64), x, g)
    names = [name for name, _ in layer.named_parameters()]
    for alone in ["input", *names]:
        one = subject.twin(layer, torch.float64)
        for name, p in one.named_parameters():
            p.requires_grad_(name == alone)
        fresh = x.clone().requires_grad_(alone == "input")
        one(subject.entering(fresh)).backward(g.clone())
        leaf = fresh if alone == "input" else dict(one.named_parameters())[alone]
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        name = "input gradient" if alone == "input" else f"gradient of {alone}"
        Run({name: found}).require_close(whole, f"{alone} alone: ")
        others = [name for name, p in one.named_parameters() if name != alone and p.grad is not None]
        require(not others, f"{alone} alone: {others[:1]} has a gradient as well")
    return f"each of {len(names) + 1} alone"


@SUITE.check("gradients add up")
def accumulates(subject: Subject, rng: torch.Generator) -> str:
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64).requires_grad_()
    g = subject.gradient(layer, x, rng)
    output = layer(x * 1)
    output.backward(g.clone(), retain_graph=True)
    leaves = {"input": x, **dict(layer.named_parameters())}
    once = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    output.backward(g.clone())
    for name, gradient in once.items():
        Run({name: leaves[name].grad}).require_close(Run({name: 2 * gradient}), "twice through one graph: ")
    return "twice through one graph is twice the gradient"


@SUITE.check("changed after forward")
def changed(subject: Subject, rng: torch.Generator) -> str:
    """The backward pass must raise where a value that it needs is gone, or have kept it."""
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64)
    g = subject.gradient(layer, x, rng)
    whole = subject.run(subject.twin(layer, torch.float64), x, g)
    raised = []
    places = ["output", *(name for name, _ in layer.named_parameters())]
    for name in places if subject.works_in_place else ["input", *places]:
        one = subject.twin(layer, torch.float64)
        leaf = x.clone().requires_grad_()
        entered = leaf * 1
        output = one(entered)
        scratch = output * 1  # what follows in a network, and needs nothing of the output
        with torch.no_grad():
            {"input": entered, "output": output, **dict(one.named_parameters())}[name].mul_(-3).add_(0.5)
        try:
            scratch.backward(g.clone())
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raised.append(name)
            continue
        found = {"input gradient": leaf.grad} | {f"gradient of {n}": p.grad for n, p in one.named_parameters()}
        Run({n: t for n, t in found.items() if t is not None}).require_close(whole, f"{name} changed, no error: ")
    return f"{', '.join(raised)}: raises" if raised else "nothing that changes is needed"
