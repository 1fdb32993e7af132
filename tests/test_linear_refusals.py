"""What the dense layer refuses, in a sentence."""

import pytest
import torch

import gdbp
from gdbp.nn.functional import linear

X, W, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
REFUSED = {
    "in_features": (
        (torch.zeros(3, 7), W, B),
        RuntimeError,
        r"input has shape \[3, 7\].*expected.*in_features = 4",
    ),
    "a number": ((torch.tensor(1.0), W, B), RuntimeError, r"input has shape \[\].*in_features = 4"),
    "weight": ((X, torch.zeros(1, 5, 4), B), RuntimeError, r"weight has 3 dimensions; expected 2"),
    "bias": ((X, W, torch.zeros(6)), RuntimeError, r"bias has shape \[6\]; expected \(5,\)"),
    "integers": (
        (X.long(), W.long(), B.long()),
        TypeError,
        r"input has dtype Long; expected float64.*convert",
    ),
    "weight dtype": (
        (X, W.double(), B),
        RuntimeError,
        r"weight has dtype Double and input has Float; .*convert",
    ),
    "bias dtype": ((X, W, B.half()), RuntimeError, r"bias has dtype Half and input has Float; .*convert"),
    "meta input": ((X.to("meta"), W, B), RuntimeError, r"weight is on cpu and input on meta; .*move one"),
    "meta weight": ((X, W.to("meta"), B), RuntimeError, r"weight is on meta and input on cpu; .*move one"),
    "meta bias": ((X, W, B.to("meta")), RuntimeError, r"bias is on meta and input on cpu; .*move one"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("grad", [False, True])
def test_refusals(case, activation, grad):
    tensors, error, sentence = REFUSED[case]
    if grad and case != "integers":
        tensors = [t.clone().requires_grad_() for t in tensors]
    with pytest.raises(error, match=sentence):
        linear(*tensors, activation=activation)


@pytest.mark.parametrize("name", ["swish", "none", "ReLU", ""])
def test_unknown_activation(name):
    for call in (lambda: linear(X, W, B, activation=name), lambda: gdbp.nn.Linear(4, 5, activation=name)):
        with pytest.raises(
            ValueError, match=f"activation is '{name}'; expected None or one of relu, leaky_relu, gelu, "
        ):
            call()


@pytest.mark.parametrize("value", [None, [1.0], 3, X.detach().numpy()], ids=lambda v: type(v).__name__)
def test_what_is_no_tensor(value):
    with pytest.raises(TypeError, match=f"input is of type {type(value).__name__}; expected a tensor"):
        linear(value, W, B)
    with pytest.raises(TypeError, match=r"input is of type .*; expected a tensor"):
        gdbp.nn.Linear(4, 5, activation="relu")(value)


def test_nested_tensors_are_torchs():
    nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
    for layer in (
        gdbp.nn.Linear(4, 5, activation="relu"),
        gdbp.nn.MLP([4, 5, 5]),
        gdbp.fuse(torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 5))),
    ):
        for one, many in zip(nested.unbind(), layer(nested).unbind(), strict=True):
            torch.testing.assert_close(layer(one), many)


def test_no_weight():
    with pytest.raises(TypeError, match="weight is of type NoneType; expected a tensor"):
        linear(X, None)


def test_backward_operator_checks_its_arguments():
    backward = torch.ops.gdbp.linear_backward
    every = (True, True, True)
    with pytest.raises(RuntimeError, match=r"grad_output has shape \[3, 6\]; expected \[3, 5\]"):
        backward(torch.zeros(3, 6), X, W, X, "none", every)
    with pytest.raises(RuntimeError, match=r"saved has shape \[3, 4\]"):
        backward(torch.zeros(3, 5), X, W, X, "relu", every)
    with pytest.raises(RuntimeError, match="grad_output has dtype Double"):
        backward(torch.zeros(3, 5).double(), X, W, X, "none", every)
    with pytest.raises(ValueError, match="activation is 'swish'; expected one of none, relu"):
        torch.ops.gdbp.linear(X, W, B, "swish")
