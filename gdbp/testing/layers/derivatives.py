"""Checks of derivatives: against finite differences, by every way that torch has, and of parts alone."""

import re
import warnings

import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vjp, vmap

from gdbp.testing.compare import number, require
from gdbp.testing.layers.subject import SUITE, Run, Subject, trained
from gdbp.testing.report import Failure, NotApplicable, one_line

_MOST = 400  # elements of an input
_DIRECTIONS = 4  # of a Jacobian, which as a whole may not fit into memory
_MOST_ONE_BY_ONE = 200  # of all tensors; of more, finite differences are taken along random directions alone


def _function(subject: Subject, rng: torch.Generator, evaluation: bool = False):
    """The layer as a function of float64 tensors, which keeps no traces of calls, and such tensors by name, x first."""
    layer = subject.make(torch.float64)
    if evaluation:
        layer.eval()
    rows = max(2, min(subject.shape[0], _MOST // max(1, subject.input(rng, rows=1).numel())))
    parameters = trained(layer)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def function(x, *values):
        state = dict(zip(parameters, values, strict=True)) | {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(layer, state, (subject.entering(x),))

    tensors = {"input": subject.input(rng, torch.float64, rows)}
    tensors |= {name: p.detach().clone() for name, p in parameters.items()}
    return function, {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def _against_differences(check, subject: Subject, rng: torch.Generator, evaluation: bool = False, **options) -> None:
    function, tensors = _function(subject, rng, evaluation)
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


@SUITE.check("gradcheck in evaluation")
def first_in_evaluation(subject: Subject, rng: torch.Generator) -> str:
    _against_differences(gradcheck, subject, rng, evaluation=True)
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


def _products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of each of some tensors with each of others."""
    return a.reshape(len(a), -1) @ b.reshape(len(b), -1).T


@SUITE.check("Jacobian, both ways")
def jacobians(subject: Subject, rng: torch.Generator) -> str:
    function, tensors = _function(subject, rng)
    x, *values = (tensor.detach() for tensor in tensors.values())

    def of_input(x):
        return function(x, *values)

    output, pull = vjp(of_input, x)
    left, right = (torch.randn(_DIRECTIONS, *t.shape, generator=rng, dtype=t.dtype) for t in (output, x))
    reverse = _products(vmap(pull)(left)[0], right)
    try:
        pushed = vmap(lambda tangent: jvp(of_input, (x,), (tangent,))[1])(right)
    except (NotImplementedError, RuntimeError) as error:
        raise _refused(error) from None
    worst = (reverse - _products(left, pushed)).abs().max().item()
    require(worst <= 1e-10 * max(1.0, reverse.abs().max().item()), f"they differ by up to {number(worst)}")
    return f"torch.func.vjp equals jvp along {_DIRECTIONS} directions"


@SUITE.check("per-sample gradients")
def per_sample(subject: Subject, rng: torch.Generator) -> str:
    """vmap of grad against one sample after the other."""
    function, tensors = _function(subject, rng)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    x = tensors.pop("input")
    if not tensors:
        raise NotApplicable("no parameters")

    def loss(tensors, sample):
        return function(sample[None], *tensors.values()).square().sum()

    try:
        expected = [grad(loss)(tensors, sample) for sample in x]
        found = vmap(grad(loss), in_dims=(None, 0))(tensors, x)
    except (RuntimeError, ValueError) as error:
        if any(True for _ in subject.make().buffers()) or "more than 1 value" in str(error):
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
    g = subject.gradient(x, rng)
    whole = subject.run(subject.twin(layer, torch.float64), x, g)
    names = list(trained(layer))
    for alone in ["input", *names]:
        one = subject.twin(layer, torch.float64)
        leaves = {"input": x.clone(), **trained(one)}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == alone)
        output = one(subject.entering(leaves["input"]))
        if output.requires_grad:  # it need not use every parameter
            output.backward(g.clone())
        leaf = leaves[alone]
        found = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        name = "input gradient" if alone == "input" else f"gradient of {alone}"
        Run({name: found}).require_close(whole, f"{alone} alone: ")
        others = [name for name, leaf in leaves.items() if name != alone and leaf.grad is not None]
        require(not others, f"{alone} alone: {others[:1]} has a gradient as well")
    return f"each of {len(names) + 1} alone"


@SUITE.check("gradients add up")
def accumulates(subject: Subject, rng: torch.Generator) -> str:
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64).requires_grad_()
    g = subject.gradient(x, rng)
    output = layer(x * 1)
    output.backward(g.clone(), retain_graph=True)
    leaves = {"input": x, **trained(layer)}
    once = {name: leaf.grad.clone() for name, leaf in leaves.items() if leaf.grad is not None}
    output.backward(g.clone())
    for name, gradient in once.items():
        Run({name: leaves[name].grad}).require_close(Run({name: 2 * gradient}), "twice through one graph: ")
    return "twice through one graph is twice the gradient"


@SUITE.check("changed after forward")
def changed(subject: Subject, rng: torch.Generator) -> str:
    """The backward pass must raise where a value that it needs is gone, or have kept it."""
    layer, x = subject.make(torch.float64), subject.input(rng, torch.float64)
    g = subject.gradient(x, rng)
    whole = subject.run(subject.twin(layer, torch.float64), x, g)
    raised = []
    places = ["output", *trained(layer)]
    for name in places if subject.works_in_place else ["input", *places]:
        one = subject.twin(layer, torch.float64)
        leaf = x.clone().requires_grad_()
        entered = leaf * 1
        output = one(entered)
        scratch = output * 1  # what follows in a network, and needs nothing of the output
        with torch.no_grad():
            {"input": entered, "output": output, **trained(one)}[name].mul_(-3).add_(0.5)
        try:
            scratch.backward(g.clone())
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raised.append(name)
            continue
        found = {"input gradient": leaf.grad} | {f"gradient of {n}": p.grad for n, p in trained(one).items()}
        Run({n: t for n, t in found.items() if t is not None}).require_close(whole, f"{name} changed, no error: ")
    return f"{', '.join(raised)}: raises" if raised else "nothing that changes is needed"
