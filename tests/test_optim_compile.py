"""torch.compile of optimizer.step: one graph for a whole training, and eager's results."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import gdbp

CONFIGS = [
    ("SGD", dict()),
    ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
    ("RMSprop", dict(momentum=0.9, centered=True)),
    ("Adam", dict(amsgrad=True, l1=0.1, clip_value=0.5)),
    ("AdamW", dict()),
    ("Adagrad", dict(lr_decay=0.1)),
    ("Adadelta", dict()),
    ("Adamax", dict()),
    ("NAdam", dict()),
    ("RAdam", dict()),
    ("Lion", dict(weight_decay=0.1, l1=0.1, l1_mode="prox")),
]
pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
EACH = pytest.mark.parametrize("name,options", CONFIGS, ids=lambda v: v if isinstance(v, str) else "")


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def train(name, options, compile_step, steps=12, fullgraph=True, lr=0.1):
    """The parameters and states after ``steps`` with a scheduler, two groups, a parameter without gradient."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).requires_grad_() for size in ((4, 3), (), (0,), (33,), (5,))]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": lr.clone() if isinstance(lr, torch.Tensor) else lr}]
    optimizer = getattr(gdbp.optim, name)(groups, lr=lr, **options)
    if not fullgraph:
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    step = torch.compile(optimizer.step, backend=compile_step, fullgraph=fullgraph) if compile_step else optimizer.step
    if fullgraph:
        # After, as Dynamo does not look into the scheduler's wrapper of step.
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        for p in params[:-1]:
            p.grad = torch.randn(p.shape, generator=generator)
        step()
        scheduler.step()
    assert params[-1] not in optimizer.state or not optimizer.state[params[-1]] or name == "Adagrad"
    return params, optimizer


def assert_same(found, expected, **tolerance):
    for p, q in zip(found[0], expected[0]):
        torch.testing.assert_close(p, q, **tolerance)
        torch.testing.assert_close(found[1].state.get(p, {}), expected[1].state.get(q, {}), **tolerance)


@EACH
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_and_eagers_results(name, options, backend):
    counter = CompileCounterWithBackend(backend)
    found = train(name, options, counter, lr=torch.tensor(0.1))
    assert counter.frame_count == 1
    assert_same(found, train(name, options, None, lr=torch.tensor(0.1)), rtol=0, atol=0)


def test_dampening_needs_a_graph_for_the_first_step():
    options = dict(momentum=0.9, dampening=0.5)
    counter = CompileCounterWithBackend("aot_eager")
    found = train("SGD", options, counter, lr=torch.tensor(0.1))
    assert counter.frame_count == 2
    assert_same(found, train("SGD", options, None, lr=torch.tensor(0.1)), rtol=0, atol=0)


@pytest.mark.parametrize("options", [dict(max_grad_norm=0.5), dict(skip_nonfinite=True)], ids=str)
def test_norm(options):
    counter = CompileCounterWithBackend("aot_eager")
    found = train("AdamW", options, counter, lr=torch.tensor(0.1))
    expected = train("AdamW", options, None, lr=torch.tensor(0.1))
    assert counter.frame_count == 1
    assert_same(found, expected)
    torch.testing.assert_close(found[1].grad_norm, expected[1].grad_norm)


def test_step_that_a_scheduler_wrapped():
    counter = CompileCounterWithBackend("aot_eager")
    found = train("AdamW", {}, counter, fullgraph=False, lr=torch.tensor(0.1))
    assert counter.frame_count == 1
    assert_same(found, train("AdamW", {}, None, lr=torch.tensor(0.1)), rtol=0, atol=0)


def test_number_as_learning_rate():
    """A number is a constant of the graph, as for torch's own: after Dynamo's limit of graphs the step is eager."""
    found = train("AdamW", {}, CompileCounterWithBackend("eager"), fullgraph=False)
    assert_same(found, train("AdamW", {}, None), rtol=0, atol=0)


def load(p, optimizer, turn):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def forget(p, optimizer, turn):
    optimizer.state.clear()


def lose_gradient(p, optimizer, turn):
    p.grad = None if turn == 4 else p.grad


def new_data(p, optimizer, turn):
    p.data = p.data + 1


def change_option(p, optimizer, turn):
    optimizer.param_groups[0]["weight_decay"] += 0.1


def add_group(p, optimizer, turn):
    if turn == 4:
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "lr": 0.5})
        optimizer.param_groups[1]["params"][0].grad = torch.ones(2)


@pytest.mark.parametrize("change", [load, forget, lose_gradient, new_data, change_option, add_group, None])
@pytest.mark.parametrize(
    "name,options",
    [
        ("NAdam", {}),
        ("SGD", dict(momentum=0.9, dampening=0.5)),
        ("SGD", dict(momentum=0.9)),
        ("AdamW", dict(ema_decay=0.9, stochastic_rounding=3)),
    ],
    ids=["NAdam", "SGD-dampening", "SGD", "AdamW-precision"],
)
def test_whatever_happens_between_steps(change, name, options):
    """Compiled steps among eager ones, and everything that a user may change."""
    results = []
    for compiled in (True, False):
        p = torch.ones(5, requires_grad=True)
        optimizer = getattr(gdbp.optim, name)([p], lr=0.1, **options)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for turn in range(8):
            p.grad = torch.arange(5.0) - turn
            if change and turn in (4, 6):
                change(p, optimizer, turn)
            (optimizer.step if turn in (2, 5) else step)()
        results.append([p, *(q for group in optimizer.param_groups[1:] for q in group["params"])])
        results[-1] += [optimizer.state[p]]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_backward_through_old_values_fails():
    p = torch.ones(5, requires_grad=True)
    optimizer = gdbp.optim.SGD([p], lr=0.1)
    loss = (p**3).sum()
    p.grad = torch.ones(5)
    torch.compile(optimizer.step, backend="aot_eager")()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
