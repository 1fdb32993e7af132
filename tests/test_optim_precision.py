"""Master weights, stochastic rounding, states of other dtypes and of 8 bits, moving averages."""

import copy

import pytest
import torch

import gdbp

NAMES = ["SGD", "RMSprop", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "Lion"]
OPTIONS = {"SGD": dict(momentum=0.9), "RMSprop": dict(momentum=0.9, centered=True), "Adam": dict(amsgrad=True)}
SIZES = [(0,), (), (7,), (33, 5), (1023,), (9001,)]
EACH = pytest.mark.parametrize("name", NAMES)
# Those that 8 bits are enough for.
COARSE = [name for name in NAMES if name != "Adadelta"]


def make(name, values, **options):
    params = [v.clone().requires_grad_() for v in values]
    own = OPTIONS.get(name, {})
    if name == "RMSprop" and options.get("state_dtype") == "8bit":
        own = own | {"centered": False}
    return params, getattr(gdbp.optim, name)(params, **({"lr": 0.01} | own | options))


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g.to(p.dtype)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_master_weights_are_a_float32_run(name, dtype):
    """The masters go bitwise as float32 parameters under the same gradients, and the parameters are their rounding."""
    values = [torch.randn(size).to(dtype) for size in SIZES]
    params, optimizer = make(name, values, master_weights=True)
    floats, exact = make(name, [v.float() for v in values])
    for _ in range(5):
        grads = [torch.randn_like(v) for v in values]
        give(params, grads)
        give(floats, grads)
        optimizer.step()
        exact.step()
        for p, f in zip(params, floats, strict=True):
            assert torch.equal(optimizer.state[p]["master_param"], f)
            assert torch.equal(p, f.to(dtype))


def test_master_follows_new_weights():
    (p,), optimizer = make("AdamW", [torch.ones(5, dtype=torch.bfloat16)], master_weights=True)
    give([p], [torch.zeros(5)])
    optimizer.step()
    with torch.no_grad():
        p.fill_(3.0)
    give([p], [torch.zeros(5)])
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["master_param"], torch.full((5,), 3.0 * (1 - 0.01 * 0.01)))


WRITES = {
    "before the first step": lambda p, o: None,
    "a new group": lambda p, o: o.add_param_group({"params": [torch.zeros(3).requires_grad_()]}),
    "a checkpoint": lambda p, o: o.load_state_dict(copy.deepcopy(o.state_dict())),
}


@pytest.mark.parametrize("write", WRITES)
def test_master_follows_where_the_optimizer_starts_anew(write):
    """Weights are written where no version tells of it; those that were not keep their digits."""
    (p,), optimizer = make("AdamW", [torch.ones(5, dtype=torch.bfloat16)], master_weights=True, weight_decay=0.0)
    give([p], [torch.ones(5)])
    optimizer.step()
    kept = optimizer.state[p]["master_param"][3:].clone()
    if write == "before the first step":
        state, optimizer = optimizer.state_dict(), make("AdamW", [p.detach()], master_weights=True)[1]
        optimizer.param_groups[0].update(params=[p], weight_decay=0.0)
        optimizer.load_state_dict(state)
    else:
        WRITES[write](p, optimizer)
    with torch.no_grad():
        p[:3] = 7.0
    optimizer.param_groups[0]["lr"] = 0.0
    give([p], [torch.ones(5)])
    optimizer.step()
    master = optimizer.state[p]["master_param"]
    assert torch.equal(master[:3], torch.full((3,), 7.0)) and torch.equal(master[3:], kept)
    assert torch.equal(p, master.bfloat16())


LATE = {
    "no state": lambda params, **options: gdbp.optim.SGD(params, lr=0.1, **options),
    "a state of its own": lambda params, **options: gdbp.optim.Adagrad(params, lr=0.1, **options),
}


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("options", [{"master_weights": True}, {"state_dtype": "8bit"}, {"ema_decay": 0.5}], ids=str)
def test_late_gradients(kind, options):
    """A parameter gets what it keeps when its first gradient comes, as if it had come at once."""
    values = [torch.randn(5000).bfloat16(), torch.randn(5000).bfloat16(), torch.randn(7)]
    late, at_once = ([v.clone().requires_grad_() for v in values] for _ in range(2))
    optimizer, other = LATE[kind](late, **options), LATE[kind](at_once[1:], **options)
    give(late[:1], [torch.ones(5000)])
    optimizer.step()
    for _ in range(3):
        grads = [torch.randn(5000), torch.randn(7)]
        give(late[1:], grads)
        give(at_once[1:], grads)
        optimizer.step()
        other.step()
    for p, q in zip(late[1:], at_once[1:], strict=True):
        assert torch.equal(p, q) and optimizer.state.get(p, {}).keys() == other.state.get(q, {}).keys()


def test_a_parameter_of_half_type_since_the_last_step_gets_a_master():
    (p,), optimizer = make("AdamW", [torch.ones(5)], master_weights=True)
    give([p], [torch.ones(5)])
    optimizer.step()
    p.data, p.grad = p.data.bfloat16(), None
    give([p], [torch.ones(5)])
    optimizer.step()
    assert torch.equal(p, optimizer.state[p]["master_param"].bfloat16())


def test_stochastic_rounding_keeps_small_updates():
    """Updates of a fiftieth of the gap between neighbours: nearest rounding loses all, stochastic none on average."""
    value, step, steps = 1.0, 2**-8 / 50, 400
    found = {}
    for stochastic in (False, True):
        p = torch.full((20_000,), value, dtype=torch.bfloat16, requires_grad=True)
        optimizer = gdbp.optim.SGD([p], lr=step, stochastic_rounding=stochastic)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        found[stochastic] = p.detach().float().mean().item()
    assert found[False] == value
    # The standard error of the mean is below 2e-5: a random walk of `steps` steps of at most half a gap each.
    assert abs(found[True] - (value - steps * step)) < 5 * (2**-8 * steps**0.5 * 0.15 / 20_000**0.5)


@EACH
def test_stochastic_rounding_is_reproducible(name):
    """For any number of threads, across a checkpoint; and another seed is another stream."""
    values = [torch.randn(size).bfloat16() for size in SIZES]
    grads = [[torch.randn_like(v) for v in values] for _ in range(6)]

    def run(seed, threads, resume):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            params, optimizer = make(name, values, stochastic_rounding=seed)
            for i, step in enumerate(grads):
                if resume and i == 3:
                    params, again = make(name, [p.detach() for p in params], stochastic_rounding=seed)
                    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                    optimizer = again
                give(params, step)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return [p.detach() for p in params]

    one = run(True, 1, False)
    assert all(map(torch.equal, one, run(True, 2, False)))
    assert all(map(torch.equal, one, run(True, 2, True)))
    assert not all(map(torch.equal, one, run(7, 1, False)))


def test_stochastic_rounding_leaves_nonfinite_alone():
    p = torch.tensor([1.0, float("inf"), float("nan"), -float("inf")]).bfloat16().requires_grad_()
    before = p.detach().clone()
    p.grad = torch.zeros_like(p)
    gdbp.optim.SGD([p], lr=0.1, stochastic_rounding=True).step()
    torch.testing.assert_close(p.detach(), before, rtol=0, atol=0, equal_nan=True)


@EACH
@pytest.mark.parametrize("param", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_state_dtype(name, param, state):
    """One step from nothing: the states are those of a float32 run, rounded once."""
    if state is torch.float16 and name not in ("SGD", "Adamax", "Lion"):
        # A mean of squares, of gradients of 1e-4 already, would be 0 and the step as long as eps allows.
        with pytest.raises(ValueError, match=f"torch.float16 for {name}, whose .*; expected torch.float32"):
            make(name, [torch.zeros(1)], state_dtype=state)
        return
    if state is torch.bfloat16 and name == "RMSprop":
        with pytest.raises(ValueError, match="bfloat16 for RMSprop, whose centered average is a difference"):
            make(name, [torch.zeros(1)], state_dtype=state)
        make(name, [torch.zeros(1)], state_dtype=state, centered=False)
        return
    values = [torch.randn(size).to(param) for size in SIZES]
    params, optimizer = make(name, values, state_dtype=state)
    floats, exact = make(name, [v.float() for v in values], state_dtype=torch.float32)
    grads = [torch.randn_like(v) for v in values]
    for group, o in ((params, optimizer), (floats, exact)):
        give(group, grads)
        o.step()
    for p, f in zip(params, floats, strict=True):
        for key, value in exact.state[f].items():
            mine = optimizer.state[p][key]
            if value.dim() == 0 and key in ("step", "mu_product"):
                continue
            assert mine.dtype is state
            torch.testing.assert_close(mine.float(), value.to(mine.dtype).float(), rtol=1e-6, atol=1e-30)


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_moving_average(name, dtype):
    values = [torch.randn(size).to(dtype) for size in SIZES]
    params, optimizer = make(name, values, ema_decay=0.8)
    wanted = [v.double() for v in values]
    for _ in range(4):
        give(params, [torch.randn_like(v) for v in values])
        optimizer.step()
        wanted = [0.8 * w + 0.2 * p.detach().double() for w, p in zip(wanted, params, strict=True)]
    for average, w in zip(optimizer.ema_parameters(), wanted, strict=True):
        # Of a half type the average takes the value before it is rounded.
        torch.testing.assert_close(
            average.double(), w, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


def test_moving_average_is_averaged_models():
    """From equal starts, swa_utils.AveragedModel and the average inside the step agree."""
    model = torch.nn.Linear(5, 3)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(model)  # its first call only copies
    optimizer = gdbp.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, ema_decay=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
    for mine, theirs in zip(optimizer.ema_parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.detach())


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("copy_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_copy(name, dtype, copy_dtype):
    values = [torch.randn(size).to(dtype) for size in SIZES]
    values += [torch.randn(5, 6).to(dtype).T, torch.randn(9).to(dtype)[::2]]
    params, optimizer = make(name, values, copy_dtype=copy_dtype)
    plain, other = make(name, values)
    assert all(map(torch.equal, optimizer.copied_parameters(), params)), "before the first step"
    for _ in range(2):
        grads = [torch.randn_like(v) for v in values]
        give(params, grads)
        give(plain, grads)
        optimizer.step()
        other.step()
    for p, q, copied in zip(params, plain, optimizer.copied_parameters(), strict=True):
        assert torch.equal(p, q)
        assert copied.dtype is copy_dtype and copied.shape == p.shape
        if p.dtype is not torch.bfloat16:
            assert torch.equal(copied, p.detach().to(copy_dtype))
        else:  # taken before the parameter was rounded
            torch.testing.assert_close(copied.float(), p.detach().float(), rtol=2**-8, atol=2**-24)


RESUMED = [
    dict(master_weights=True),
    dict(stochastic_rounding=3),
    dict(state_dtype=torch.float32),
    dict(state_dtype="8bit"),
    dict(ema_decay=0.9),
    dict(copy_dtype=torch.float16),
    dict(master_weights=True, state_dtype="8bit", ema_decay=0.9, max_grad_norm=1.0),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [(n, o) for o in RESUMED for n in (COARSE if o.get("state_dtype") == "8bit" else NAMES)],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_resume(name, options):
    """Three steps, a checkpoint, three more: bitwise six steps."""
    values = [torch.randn(size).bfloat16() for size in SIZES]
    grads = [[torch.randn_like(v) for v in values] for _ in range(6)]
    through, optimizer = make(name, values, **options)
    for i, step in enumerate(grads):
        if i == 3:
            resumed, other = make(name, [p.detach() for p in through], **options)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        give(through, step)
        optimizer.step()
        if i >= 3:
            give(resumed, step)
            other.step()
    assert all(map(torch.equal, through, resumed))
    for p, q in zip(through, resumed, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert other.state[q][key].dtype is value.dtype
            assert torch.equal(other.state[q][key], value)


def test_averages_and_copies_that_nobody_asked_for():
    (_,), optimizer = make("AdamW", [torch.zeros(1)])
    with pytest.raises(ValueError, match="there are no averages: make the AdamW with ema_decay="):
        optimizer.ema_parameters()
    with pytest.raises(ValueError, match="there are no copies: make the AdamW with copy_dtype="):
        optimizer.copied_parameters()


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(state_dtype="4bit"), "Invalid state_dtype"),
        (dict(state_dtype=torch.int8), "Invalid state_dtype"),
        (dict(ema_decay=1.0), "Invalid ema_decay"),
        (dict(ema_decay=float("nan")), "Invalid ema_decay"),
        (dict(stochastic_rounding=-1), "Invalid stochastic_rounding"),
        (dict(copy_dtype=torch.int8), "Invalid copy_dtype"),
        (dict(copy_dtype=torch.bfloat16, master_weights=True), "Invalid copy_dtype"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        gdbp.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **options)


@pytest.mark.parametrize(
    "options", [{"state_dtype": "8bit"}, {"state_dtype": torch.float32}, {"copy_dtype": torch.half}]
)
def test_complex_parameters_have_their_own_dtype(options):
    p = torch.zeros(3, dtype=torch.complex64, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = gdbp.optim.AdamW([p], **options)
    with pytest.raises(ValueError, match=r"shape \(3,\) is torch.complex64, and states and copies"):
        optimizer.step()
    assert not optimizer.state and not p.any()


def test_do_not_go_with_torchs_step():
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.ones(1)
    optimizer = gdbp.optim.AdamW([p], ema_decay=0.9, differentiable=True)
    with pytest.raises(RuntimeError, match="do not go with"):
        optimizer.step()
    assert p.item() == 0
