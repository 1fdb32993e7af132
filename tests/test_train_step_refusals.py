"""What ``gdbp.TrainStep`` says where it can't help, and what it does then with ``strict=False``."""

import copy

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gdbp
from gdbp import nn, optim
from tests.training import CLASSES, FEATURES, Pair, close, data, eager, network, same_state


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(FEATURES, FEATURES)

    def forward(self, x):
        return x + self.linear(x)


class Block(Residual):
    def forward(self, x):
        return self.linear(x).relu()


def hooked():
    model = network(4)
    model[0].register_forward_hook(lambda *_: None)
    return model


def tied():
    model = network(FEATURES, FEATURES)
    model[1].weight = model[0].weight
    return model


REFUSED_MODELS = [
    (lambda: torch.nn.Sequential(Residual(), network(4)), "Residual '0' has no fused form; expected Sequential"),
    (hooked, "Linear '0' has hooks .*; remove them, or use strict=False"),
    (tied, "Linear '1' shares a parameter with Linear '0'; .*use strict=False"),
    (lambda: torch.nn.Sequential(torch.nn.ELU(alpha=0.5), network(4)), "ELU '0' has alpha=0.5; expected 1.0"),
    (lambda: torch.nn.Sequential(network(4), torch.nn.Softmax(1)), "Softmax '1' has no fused form"),
    (lambda: torch.nn.Sequential(torch.nn.Flatten(2), network(4)), "flattens dimensions 2 to -1; .*use strict=False"),
    (lambda: torch.nn.Sequential(torch.nn.Flatten(0), network(4)), "after a Flatten that joins rows; .*strict=False"),
    (lambda: torch.nn.Sequential(), "no layers"),
    (lambda: torch.nn.Sequential(torch.nn.ReLU()), "no layers with parameters; expected at least one Linear"),
    (lambda: torch.nn.Sequential(torch.nn.LazyLinear(3)), "LazyLinear '0' has no parameters yet; call the model once"),
    (lambda: torch.compile(network(4)), "pass the model that torch.compile was given"),
    (lambda: gdbp.fuse(Block()), "^Block has no fused form; .*use strict=False"),
    (
        lambda: torch.nn.utils.parametrizations.weight_norm(network(4)[0]),
        "weight of .* is computed, .*; make it a parameter again, or use strict=False",
    ),
]


@pytest.mark.parametrize("make, sentence", REFUSED_MODELS)
def test_refused_models(make, sentence):
    model = make()
    optimizer = optim.SGD([*model.parameters()] or [torch.zeros(1)], lr=0.1)
    with pytest.raises(ValueError, match=sentence):
        gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer, strict=False)
    assert step.explain().startswith("eager: ")


@pytest.mark.parametrize(
    "loss, sentence",
    [
        (nn.CrossEntropyLoss(reduction="none"), "CrossEntropyLoss has reduction='none'"),
        (torch.nn.NLLLoss(), "NLLLoss is no loss with a fused form"),
        (lambda a, b: (a - b).sum(), "is no loss with a fused form"),
        (nn.CrossEntropyLoss(label_smoothing=2.0), "label_smoothing=2.0"),
        (nn.HuberLoss(delta=-1.0), "delta=-1.0; expected a number above 0"),
    ],
)
def test_refused_losses(loss, sentence):
    model = network(4)
    with pytest.raises(ValueError, match=sentence):
        gdbp.TrainStep(model, loss, optim.SGD(model.parameters(), lr=0.1))


def test_refused_optimizers():
    model = network(4)
    loss = nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="Adamax has no fused form; expected an optimizer of"):
        gdbp.TrainStep(model, loss, torch.optim.Adamax(model.parameters()))
    with pytest.raises(ValueError, match="max_grad_norm is 0"):
        gdbp.TrainStep(model, loss, optim.SGD(model.parameters(), lr=0.1), max_grad_norm=0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    step = gdbp.TrainStep(model, loss, optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(ValueError, match="SGD has step hooks"):
        step(*data())
    handle.remove()
    optimizer.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match="differentiable"):
        step(*data())


HOOKS = {
    "gradient": lambda model: model[0].weight.register_hook(lambda grad: grad * 0),
    "accumulated gradient": lambda model: model[0].bias.register_post_accumulate_grad_hook(lambda p: None),
    "module": lambda model: model[1].register_full_backward_hook(lambda *_: None),
    "all modules": lambda _: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "all optimizers": lambda _: register_optimizer_step_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_are_refused_whenever_they_come(kind):
    pair = Pair()
    pair.train()
    handle = HOOKS[kind](pair.model)
    try:
        before = copy.deepcopy(pair.model.state_dict())
        for _ in range(2):
            with pytest.raises(ValueError, match=r"hooks.*, which a fused step would not call; remove them"):
                pair.step(*data())
        torch.testing.assert_close(pair.model.state_dict(), before, rtol=0, atol=0)
        with pytest.raises(ValueError, match="hooks"):
            gdbp.TrainStep(pair.model, pair.loss, pair.optimizer)(*data())
    finally:
        handle.remove()
    pair.train()
    again = HOOKS[kind](pair.model)
    try:
        with pytest.raises(ValueError, match="hooks"):
            pair.step(*data())
    finally:
        again.remove()


def test_hooks_are_called_where_not_strict():
    pair = Pair(strict=False)
    for model in (pair.model, pair.twin):
        model[0].weight.register_hook(lambda grad: grad * 0)
    before = pair.model[0].weight.clone()
    pair.train()
    assert pair.step.explain().startswith("eager: weight of Linear '0' has hooks")
    torch.testing.assert_close(pair.model[0].weight, before * (1 - 1e-2 * 1e-2) ** 2)  # decay alone


def test_a_limit_that_is_none():
    pair = Pair()
    pair.step.max_grad_norm = -1.0
    with pytest.raises(ValueError, match=r"max_grad_norm is -1.0; expected a number above 0, or None"):
        pair.step(*data())


REFUSED_INPUTS = [
    (lambda x, y: (x.numpy(), y), TypeError, "the input is no tensor; expected two"),
    (lambda x, y: (x, None), TypeError, "the target is no tensor; expected two"),
    (lambda x, y: (x.bfloat16(), y), ValueError, "input has dtype BFloat16"),
    (lambda x, y: (x.double(), y), ValueError, "weight of Linear '0' .*expected .* of the input's dtype Double"),
    (lambda x, y: (x[:, :5], y), ValueError, "Linear '0' gets 5 features; expected 12"),
    (lambda x, y: (x[None], y), ValueError, "input has shape .*; expected .rows, features."),
    (lambda x, y: (x.to("meta"), y), ValueError, "on meta; expected float32 or float64 on cpu"),
    (lambda x, y: (x, y.to("meta")), ValueError, "target is on meta"),
    (lambda x, y: (x, y[:3]), ValueError, "target has shape .3.; expected .16,., a label for each row"),
    (lambda x, y: (x, y.int()), TypeError, "target has dtype Int; expected int64 labels"),
    (lambda x, y: (x, torch.full_like(y, 7)), IndexError, "Target 7 is out of bounds"),
    (lambda x, y: (x, torch.rand(16, 3)), ValueError, "target has shape .16, 3. and the model's output .16, 5."),
    (
        lambda x, y: (x, y.float()),
        ValueError,
        r"target has shape \[16\] and dtype Float; expected int64 labels, .* \[16, 5\]; convert labels with .long",
    ),
    (
        lambda x, y: (x, torch.nn.functional.one_hot(y, CLASSES)),
        ValueError,
        "expected .16,., a label for each row; reshape it, or convert one-hot labels with .to.. to the input's dtype",
    ),
    (
        lambda x, y: (x.requires_grad_(), y),
        ValueError,
        "a gradient of the input is required, .*; put the layers before it",
    ),
    (
        lambda x, y: (x, torch.rand(16, CLASSES, requires_grad=True)),
        ValueError,
        "a gradient of the target is required, .*detach.*, or use strict=False",
    ),
]


@pytest.mark.parametrize("change, error, sentence", REFUSED_INPUTS)
def test_refused_inputs_change_nothing(change, error, sentence):
    model = torch.nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    optimizer = optim.Adam(model.parameters())
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optimizer)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(error, match=sentence):
            step(*change(*data()))
        assert not optimizer.state and step.steps == 0
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    step(*data())


def test_batch_norm_wants_two_rows():
    model = torch.nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step(*data(1))
    model.eval()
    step(*data(1))


def test_many_refuses():
    pair = Pair()
    x, y = data()
    with pytest.raises(ValueError, match="tensors have 16 and 3 rows"):
        pair.step.many((x, y[:3]))
    with pytest.raises(ValueError, match="batch_size is 17; expected None, or 1 to the 16 rows"):
        pair.step.many((x, y), 17)
    with pytest.raises(ValueError, match=r"batch_size is 2.0; expected None, or 1 to the 16 rows"):
        pair.step.many((x, y), 2.0)
    with pytest.raises(ValueError, match="steps is -1; expected None, or a whole number"):
        pair.step.many((x, y), 2, -1)
    with pytest.raises(ValueError, match="tensors have no rows"):
        pair.step.many((x[:0], y[:0]))
    with pytest.raises(TypeError, match=r"tensors is of type Tensor; expected a tuple \(inputs, targets\)"):
        pair.step.many(x)
    with pytest.raises(TypeError, match=r"tensors is of type tuple and length 3; expected a tuple \(inputs, targets\)"):
        pair.step.many((x, y, y))
    with pytest.raises(ValueError, match="a gradient of the inputs is required"):
        pair.step.many((x.clone().requires_grad_(), y), 4)
    with pytest.raises(TypeError, match="targets is of type list; expected a tensor"):
        pair.step.many((x, y.tolist()))
    with pytest.raises(TypeError, match=r"inputs is torch.sparse_coo; expected a dense tensor; use .to_dense\(\)"):
        pair.step.many((x.to_sparse(), y))
    with pytest.raises(TypeError, match=r"generator is 3; expected a torch.Generator, or None"):
        pair.step.many((x, y), 4, generator=3)
    with pytest.raises(TypeError, match="shuffle is 'no'; expected True or False"):
        pair.step.many((x, y), 4, shuffle="no")
    for size in (4, 5, 16):
        with pytest.raises(ValueError, match="input has dtype Float on meta"):
            pair.step.many((x.to("meta"), y), size)
        with pytest.raises(ValueError, match="target is on meta"):
            pair.step.many((x, y.to("meta")), size)
    # All labels are looked at before the first step, and told by their row of the data set.
    bad = y.clone()
    bad[13] = 9
    for shuffle in (True, False):
        with pytest.raises(IndexError, match="Target 9 is out of bounds: cross_entropy got it for row 13; expected"):
            pair.step.many((x, bad), 4, shuffle=shuffle)
    assert pair.step.steps == 0
    pair.step.many((x, bad), 4, 3, shuffle=False)
    # But for those that it does not come to.
    for i in range(0, 12, 4):
        eager(pair.twin, pair.loss, pair.other, x[i : i + 4], y[i : i + 4])
    assert pair.step.steps == 3
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)


def test_switches_and_copies():
    pair = Pair()
    for name in ("strict", "keep_grads"):
        with pytest.raises(TypeError, match=f"{name} is 'no'; expected True or False"):
            gdbp.TrainStep(pair.model, pair.loss, pair.optimizer, **{name: "no"})
    with pytest.raises(TypeError, match="a TrainStep has nothing of its own: copy or save its model"):
        copy.deepcopy(pair.step)


def test_lost_storage():
    """As by what shards parameters."""
    pair = Pair()
    x, y = data()
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="input has lost its storage"):
        pair.step(x, y)
    for lost in ("grad", "state"):
        p = torch.ones(5, requires_grad=True)
        p.grad = torch.ones(5)
        optimizer = optim.Adam([p])
        optimizer.step()
        (p.grad if lost == "grad" else optimizer.state[p]["exp_avg"]).untyped_storage().resize_(0)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"a parameter of shape \[5\], its gradient or a state has lost"):
                optimizer.step()


def test_many_looks_at_the_last_step_first():
    """A rest of one row is too few for a batch norm."""
    model = torch.nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES))
    before = copy.deepcopy(model.state_dict())
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        step.many(data(9), 4, shuffle=False)
    assert step.steps == 0 and not step.optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


@pytest.mark.parametrize("norm", [None, 0.1])
def test_eager_where_not_strict(norm):
    model = torch.nn.Sequential(Residual(), network(4))
    pair = Pair(model, strict=False, max_grad_norm=norm)
    if norm is None:
        pair.train(3)
    x, y = data(20)
    losses = pair.step.many((x, y), 8, 5, generator=torch.Generator().manual_seed(0))
    assert losses.shape == (5,) and not losses.requires_grad
    assert pair.step.grad_norms is None if norm is None else pair.step.grad_norms.shape == (5,)
    assert pair.step.memory() == {"rows": 0, "bytes": 0, "unshared_bytes": 0}


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"model": None}, TypeError, "model is of type NoneType; expected a torch.nn.Module"),
        ({"loss": 3}, TypeError, "loss is of type int; expected a loss module, or a function"),
        ({"optimizer": "sgd"}, TypeError, "optimizer is of type str; expected a torch.optim.Optimizer"),
        ({"seed": 1.5}, TypeError, "seed is 1.5; expected a whole number, or None"),
        ({"max_grad_norm": "1"}, TypeError, "max_grad_norm is '1'; expected a number"),
        ({"model": network(4)}, ValueError, "optimizer has none of the model's parameters"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_refused_arguments(change, error, sentence, strict):
    model = network(4)
    arguments = {"model": model, "loss": nn.MSELoss(), "optimizer": optim.SGD(model.parameters(), lr=0.1), **change}
    with pytest.raises(error, match=sentence):
        gdbp.TrainStep(**arguments, strict=strict)


def test_sparse_input():
    pair, (x, y) = Pair(strict=False), data()
    close(pair.step(x.to_sparse(), y), eager(pair.twin, pair.loss, pair.other, x, y))
    assert "the input is torch.sparse_coo; expected a dense tensor" in pair.step.explain()


def test_a_dtype_that_runs_eagerly_is_said():
    model = network(4).bfloat16()
    step = gdbp.TrainStep(model, nn.MSELoss(), optim.SGD(model.parameters(), lr=0.1), strict=False)
    step(torch.randn(3, FEATURES).bfloat16(), torch.randn(3, CLASSES).bfloat16())
    assert step.explain().startswith("eager")


def test_eager_for_one_input():
    """What only one input can't have is no reason for the next."""
    pair = Pair(network(4), nn.MSELoss(), strict=False)
    x, y = data(target="values")
    batch = x.reshape(4, 4, FEATURES), y.reshape(4, 4, CLASSES)
    close(pair.step(*batch), eager(pair.twin, pair.loss, pair.other, *batch))
    assert pair.step.explain().startswith("eager, for the last step's batch: TrainStep: input has shape")
    close(pair.step(x, y), eager(pair.twin, pair.loss, pair.other, x, y))
    assert pair.step.explain().startswith("fused")
    pair.step(*batch), eager(pair.twin, pair.loss, pair.other, *batch)
    pair.step.many((x, y), shuffle=False), eager(pair.twin, pair.loss, pair.other, x, y)
    assert pair.step.explain().startswith("fused")
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)


def test_layers_before_the_step_are_trained_where_not_strict():
    """By the graph that the input brings along."""
    pair = Pair(strict=False)
    torch.manual_seed(0)
    first = torch.nn.Linear(3, FEATURES)
    second = copy.deepcopy(first)
    pair.optimizer.add_param_group({"params": first.parameters()})
    pair.other.add_param_group({"params": second.parameters()})
    before, y = first.weight.clone(), data()[1]
    for i in range(2):
        x, _ = data(inputs=3, seed=i)
        close(pair.step(first(x), y), eager(pair.twin, pair.loss, pair.other, second(x), y))
        assert "a gradient of the input is required" in pair.step.explain()
    close(first.weight, second.weight)
    assert not torch.equal(first.weight, before)
    same_state(pair.model, pair.optimizer, pair.twin, pair.other)


def test_a_weight_that_is_not_contiguous():
    pair = Pair(network(4))
    pair.model[0].weight.data = pair.model[0].weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"convert input or model with .to\(\), or make it .contiguous\(\)"):
        pair.step(*data())


def test_autocast_is_refused():
    pair = Pair()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"autocast is on.*strict=False"):
        pair.step(*data())


def test_explains():
    model = torch.nn.Sequential(nn.Linear(FEATURES, 8), torch.nn.GELU(), torch.nn.Dropout(0.1), nn.Linear(8, CLASSES))
    step = gdbp.TrainStep(model, nn.CrossEntropyLoss(), optim.AdamW(model.parameters()))
    text = step.explain()
    for part in ("fused", "Linear '0': linear + gelu", "Dropout '2'", "CrossEntropyLoss", "right after its gradient"):
        assert part in text
    step.max_grad_norm = 1.0
    assert "after the norm of all gradients" in step.explain()
