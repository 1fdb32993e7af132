"""The conformance checks of layers: clean on ours, right about torch's, and able to find every planted fault."""

import pytest
import torch

import gdbp
from gdbp.__main__ import main
from gdbp.testing import Report, check_layer
from gdbp.testing.layers import SUITE
from gdbp.testing.report import NOT_APPLICABLE
from tests import broken_layers as broken

INPUTS = {f"{kind} input" for kind in ("strided", "transposed", "expanded", "misaligned")}
FORWARD = {"forward mode", "Jacobian, both ways"}  # which a Function of its own may do without
NO_PARAMETERS = {
    "per-sample gradients", "strided parameters", "transposed parameters", "misaligned parameters", "dtype mismatch",
    "parameters replaced", "same seed, same parameters", "parametrizations",
}  # fmt: skip


def report(cls, *shape, **kwargs) -> Report:
    """All checks in this process, which saves the start of another."""
    return Report(cls.__name__, tuple(SUITE.run(name, cls, (kwargs, shape)) for name in SUITE.checks))


def inapplicable(found: Report) -> set[str]:
    return {check.name for check in found.checks if check.status == NOT_APPLICABLE}


ACTIVATIONS = [None, "relu", "leaky_relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "elu", "softplus"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_our_linear_is_clean(activation):
    found = report(gdbp.nn.Linear, 8, 5, in_features=5, out_features=3, activation=activation)
    assert found.passed and not inapplicable(found), str(found)


@pytest.mark.parametrize("shape", [(8, 3), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "silu"}, {"affine": False}, {"momentum": None}], ids=str)
def test_our_batch_norm_is_clean(options, shape):
    found = report(gdbp.nn.BatchNorm1d, *shape, num_features=3, **options)
    assert found.passed, str(found)
    without = NO_PARAMETERS if options == {"affine": False} else {"parametrizations", "per-sample gradients"}
    assert inapplicable(found) == without, str(found)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "batch_norm": True}, {"dropout": 0.5}], ids=str)
def test_our_mlp_is_clean(options):
    found = report(gdbp.nn.MLP, 8, 5, sizes=[5, 7, 6, 3], **options)
    assert found.passed, str(found)
    missing = {"per-sample gradients"} if "batch_norm" in options else set()
    assert inapplicable(found) <= missing | {"device and dtype arguments"}, str(found)


# What torch 2.13 gets wrong on the CPU. A later release may mend it; it should not break more.
@pytest.mark.parametrize(
    "cls,shape,kwargs,wrong,without",
    [
        (torch.nn.Linear, (8, 5), dict(in_features=5, out_features=3), set(), set()),
        (
            torch.nn.BatchNorm1d, (8, 3), dict(num_features=3),
            {"strided parameters"}, {"per-sample gradients", "parametrizations"},
        ),
        (torch.nn.LayerNorm, (8, 5), dict(normalized_shape=5), set(), {"parametrizations"}),
        (torch.nn.Dropout, (8, 5), dict(), set(), NO_PARAMETERS | {"device and dtype arguments"}),
        (torch.nn.Conv1d, (4, 3, 9), dict(in_channels=3, out_channels=2, kernel_size=3), set(), set()),
        (
            torch.nn.ReLU, (8, 5), dict(inplace=True), set(),
            INPUTS | NO_PARAMETERS
            | {"device and dtype arguments", "input left as it is", "hooks", "activation checkpointing"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_torchs_layers(cls, shape, kwargs, wrong, without):
    found = report(cls, *shape, **kwargs)
    failed = set(found.failed)
    assert failed == wrong if torch.__version__.startswith("2.13.") else failed <= wrong, str(found)
    assert inapplicable(found) == without, str(found)


@pytest.mark.parametrize("cls", [broken.Plain, broken.WithFunction, broken.Counts])
def test_plain_layers_are_clean(cls):
    found = report(cls, 8, 5, features=5)
    assert found.passed, str(found)
    assert inapplicable(found) <= {"parametrizations", "per-sample gradients", *FORWARD}


@pytest.mark.parametrize(
    "cls,without",
    [
        (broken.WithFrozen, {"parametrizations"}),
        (broken.Tied, {"load with assign", "device and dtype arguments"}),
        (broken.Total, {"parametrizations"}),
    ],
)
def test_unusual_layers_are_clean(cls, without):
    found = report(cls, 8, 5, features=5)
    assert found.passed and inapplicable(found) == without, str(found)


def test_a_layer_without_copies_fails_in_copies_alone():
    found = report(broken.Normed, 8, 5, features=5)
    assert found.failed == ("deepcopy",), str(found)


@pytest.mark.parametrize(
    "cls,shape,kwargs",
    [
        # Sums over many positions, which torch adds one after the other.
        (torch.nn.Conv3d, (2, 2, 4, 4, 4), dict(in_channels=2, out_channels=3, kernel_size=2)),
        # Kinks, on whose other side a rounding may lead.
        (torch.nn.TransformerEncoderLayer, (2, 3, 8), dict(d_model=8, nhead=2, dim_feedforward=12, dropout=0.0)),
        # Constant inputs, whose variance is rounding.
        (torch.nn.BatchNorm2d, (4, 3, 4, 4), dict(num_features=3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_no_false_alarms(cls, shape, kwargs):
    assert report(cls, *shape, **kwargs).passed


@pytest.mark.parametrize(
    "name,cls,shape,kwargs",
    [
        # 12 GB as a whole
        ("Jacobian, both ways", torch.nn.Conv2d, (2, 3, 64, 64), dict(in_channels=3, out_channels=8, kernel_size=3)),
        # 17 GB of all samples
        ("per-sample gradients", torch.nn.Linear, (2048, 1024), dict(in_features=1024, out_features=1024)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_large_layers_fit_into_memory(name, cls, shape, kwargs):
    assert SUITE.run(name, cls, (kwargs, shape)).passed


# What Dynamo makes of a Function of its own depends on torch's release.
COMPILED = {"torch.compile"}


FOUND = [
    (broken.WrongSlope, {"gradcheck", "gradcheck in evaluation", "gradgradcheck", "batched gradients"}),
    (broken.LosesSecondDerivative, {"gradgradcheck"}),
    (broken.WrongTangent, FORWARD),
    (broken.HidesFromAutograd, {"gradgradcheck", "changed after forward"}),
    (
        broken.WritesTheGradient,
        {"batched gradients", "input left as it is"}
        | {f"{kind} gradient" for kind in ("strided", "transposed", "expanded", "misaligned")},
    ),
    (broken.TakesStridesForContiguous, {"strided input", "transposed input"}),
    (broken.TakesParametersForContiguous, {"strided parameters"}),
    (broken.HidesNaN, {"NaN and infinity visible"}),
    (broken.RoundsCoarsely, {"accuracy float32", "accuracy in evaluation", "torch.compile"}),
    (broken.DividesByRows, {"no rows"}),
    (broken.KeepsOldWeights, {"parameters replaced", "fake tensors"}),
    (broken.KeepsStateElsewhere, {"checkpoint", "device and dtype arguments"}),
    (broken.MovesInEvaluation, {"no_grad and inference_mode", "other dtypes and back"}),
    (broken.AsksForValues, {"per-sample gradients", "torch.compile", "torch.export", "fake tensors"}),
    (broken.SharesCopies, {"deepcopy"}),
    (broken.IgnoresDtype, {"device and dtype arguments"}),
    (broken.RoundsUnderAutocast, {"autocast"}),
    (broken.GivesUnaskedGradients, {"only what is asked for"}),
    (broken.IgnoresOffsets, {"misaligned input"}),
    (broken.IgnoresOffsetsOfParameters, {"misaligned parameters"}),
    (broken.TakesExpandedForEmpty, {"expanded input"}),
    (broken.RoundsHalvesCoarsely, {"accuracy bfloat16", "accuracy float16"}),
    (broken.ReadsFloat64AsFloat32, {"dtype mismatch"}),
    (broken.TakesMatrixForContiguous, {"strided parameters", "transposed parameters"}),
    (broken.UnpicklesAsNew, {"pickle"}),
    (broken.CallsItselfTwice, {"hooks"}),
    (broken.RoundsWhenConverted, {"other dtypes and back"}),
    (broken.MovesWeights, {"input left as it is"}),
    (broken.ReusesOutput, {"no_grad and inference_mode"}),
    (broken.LearnsInTrainingOnly, {"gradcheck in evaluation"}),
    (broken.RoundsInEvaluation, {"accuracy in evaluation"}),
    (broken.ForgetsItsDevice, {"fake tensors"}),
    (broken.LosesGradientUnderAutocast, {"autocast"}),
]


@pytest.mark.parametrize("fault,caught", FOUND, ids=lambda value: getattr(value, "__name__", ""))
def test_planted_faults(fault, caught):
    found = report(fault, 8, 5, features=5)
    uncertain = COMPILED if issubclass(fault, broken.WithFunction) else set()
    assert set(found.failed) - uncertain == caught, str(found)


FOUND_AMONG_OTHERS = [
    (broken.KeepsFirstParameters, {"parameters replaced", "load with assign", "parametrizations"}),
    (broken.DrawsWithoutSeed, {"same seed, same parameters"}),
    (broken.AddsInAnyOrder, {"same bits again"}),
    (broken.AddsUpOnce, {"gradients add up"}),
    (broken.KnowsItsTensors, {"hooks on saved tensors"}),
    (broken.CountsForwards, {"activation checkpointing"}),
    (broken.TellsAnotherDtype, {"fake tensors"}),
]


@pytest.mark.parametrize("fault,caught", FOUND_AMONG_OTHERS, ids=lambda value: getattr(value, "__name__", ""))
def test_faults_that_more_than_one_check_finds(fault, caught):
    found = report(fault, 8, 5, features=5)
    assert caught <= set(found.failed), str(found)


def test_every_check_finds_a_fault():
    """One that finds none here would be one that asserts nothing."""
    assert set().union(*(caught for _, caught in FOUND + FOUND_AMONG_OTHERS)) == set(SUITE.checks)


def test_a_crash_is_one_failed_check():
    found = check_layer(broken.ReadsPastSmallInputs, input_shape=(8, 5), features=5)
    assert found.failed == ("no rows",) and "SIGSEGV" in found["no rows"].evidence, str(found)
    assert [check.name for check in found.checks] == list(SUITE.checks)


def test_evidence_names_the_parameter():
    found = report(broken.WrongBiasGradient, 8, 5, features=5)
    assert found["gradcheck"].evidence == "Jacobian mismatch for output 0 for bias"


@pytest.mark.parametrize(
    "cls,options,error,text",
    [
        (torch.nn.GELU(), {}, TypeError, "expected a subclass of torch.nn.Module itself"),
        (torch.optim.SGD, {}, TypeError, "expected a subclass of torch.nn.Module itself"),
        (torch.nn.GELU, {"input_shape": ()}, ValueError, r"input_shape is \(\); expected sizes above 0, such as"),
        (torch.nn.GELU, {"input_shape": 3}, ValueError, "input_shape is 3; expected sizes above 0"),
        (torch.nn.GELU, {"input_shape": (3, 0)}, ValueError, "expected sizes above 0"),
        (torch.nn.GELU, {"approximate": "no"}, RuntimeError, "approximate"),
        (torch.nn.Linear, {"in_features": 4, "out_features": 2}, RuntimeError, "shapes cannot be multiplied"),
        (
            torch.nn.Linear,
            {"in_features": 5, "out_features": 2, "input_shape": (5,)},
            ValueError,
            "the batch first, of any",
        ),
        (torch.nn.LazyLinear, {"out_features": 2}, TypeError, "weight of LazyLinear is lazy; expected a layer of real"),
        (
            torch.nn.FractionalMaxPool2d,
            {"kernel_size": 2, "output_size": 3, "input_shape": (2, 3, 6, 6)},
            TypeError,
            "draws random numbers in evaluation, too",
        ),
        (
            torch.nn.Linear,
            {"in_features": 5, "out_features": 2, "dtype": torch.complex64},
            TypeError,
            "is complex; expect",
        ),
        (torch.nn.LSTM, {"input_size": 5, "hidden_size": 2}, TypeError, "LSTM returns tuple; expected a layer that"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refuses(cls, options, error, text):
    with pytest.raises(error, match=text):
        check_layer(cls, **{"input_shape": (8, 5), **options})


class TestCommandLine:
    def test_clean(self, capsys):
        arguments = ["--kw", "in_features=5", "out_features=3", "activation=gelu", "--input", "8,5"]
        assert main(["check", "gdbp.nn.Linear", *arguments]) == 0
        table = capsys.readouterr().out
        head = "gdbp.nn.linear.Linear(in_features=5, out_features=3, activation='gelu') of (8, 5)\n"
        assert table.startswith(head) and table.endswith(" 0 failed, 0 not applicable\n")

    def test_failing(self, capsys):
        assert main(["check", "tests.broken_layers.HidesNaN", "--kw", "features=5", "--input", "8,5"]) == 1
        assert "FAIL  a NaN in the input is not in the output" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "arguments,sentence",
        [
            (["torch.nn.GELU"], "torch.nn.GELU is a layer; say of which shape its inputs are, such as --input 8,3"),
            (["torch.optim.Adam", "--input", "8"], "--input is for layers, and torch.optim.Adam is none; leave it out"),
            (["torch.nn.GELU", "--input", "8x3"], "got '8x3'; expected sizes above 0 and commas, as in 8,3"),
            (["torch.nn.GELU", "--input", "8,0"], "got '8,0'; expected sizes above 0"),
            (["torch.nn.Linear", "--input", "8,3"], "can't be checked: TypeError: "),
            (["torch.nn.GELU", "--kw", "input_shape=3", "--input", "8,3"], "multiple values for keyword argument"),
        ],
    )
    def test_wrong_arguments(self, arguments, sentence, capsys):
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count("\n") == 1
