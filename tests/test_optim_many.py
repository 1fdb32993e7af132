"""Many small tensors, which take a shorter way through a step: whatever has changed since the last one is seen, and
the numbers are those of the long way, which one strided parameter among them makes all go."""

import weakref

import pytest
import torch

import gdbp

COUNT = 300  # enough for two threads


def numbers(seed, count=COUNT):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1 + i % 9, 3, generator=generator) for i in range(count)]


class Training:
    def __init__(self, cls, long, **options):
        self.params = [torch.nn.Parameter(x) for x in numbers(0)]
        self.groups = [{"params": self.params[:200]}, {"params": self.params[200:], "lr": 0.02}]
        if long:
            odd = torch.nn.Parameter(torch.randn(6, 4)[:, ::2])
            odd.grad = torch.zeros(6, 2)  # which leaves the norm as it is
            self.groups[1]["params"] = [*self.params[200:], odd]
        self.optimizer = cls(self.groups, lr=0.01, **options)
        self.give(1)

    def give(self, seed):
        for p, g in zip(self.params, numbers(seed)):
            p.grad = g.to(p.dtype)

    def state(self, i):
        return self.optimizer.state[self.params[i]]

    def tensors(self):
        kept = [self.optimizer.state[p] for p in self.params]
        return [*self.params, *(state[key] for state in kept for key in sorted(state) if key != "mine")]


def replaced(t):
    for i in range(3, COUNT, 50):
        state = t.state(i)
        for key in state:
            state[key] = state[key].clone() + 1


def swapped(t):
    state = t.state(7)
    state["exp_avg"], state["exp_avg_sq"] = state["exp_avg_sq"], state["exp_avg"].abs()


def renamed(t):
    for i in (0, 250):  # the last key, so that only its name changes
        t.state(i)["mine"] = t.state(i).pop(list(t.state(i))[-1])


def reordered(t):
    for i in (0, 130):
        t.state(i)["step"] = t.state(i).pop("step")


def extended(t):
    for i in (5, 299):
        t.state(i)["mine"] = "a note"


def emptied(t):
    t.state(9).clear()
    t.optimizer.state.pop(t.params[290])


def moved(t):
    for i, state in ((2, t.state(2)), (260, t.state(260))):
        t.params[i].data = t.params[i].detach() * 2
        state["exp_avg"].data = state["exp_avg"] * 3
        state["exp_avg_sq"].set_(state["exp_avg_sq"].clone() * 2)
        state["step"].data = state["step"].double() + 4


def strided(t):
    for i in (4, 280):
        t.params[i].data = torch.stack([t.params[i].detach()] * 2, -1)[..., 0]
        t.state(i)["exp_avg"].data = t.state(i)["exp_avg"].t().clone().t()


def strided_gradients(t):
    for i in (1, 270):
        t.params[i].grad = t.params[i].grad.t().clone().t()


def frozen(t):
    for p in (*t.params[:30], *t.params[100:103], t.params[-1]):
        p.grad = None


def all_frozen(t):
    for p in t.params:
        p.grad = None


def tuned(t):
    t.optimizer.param_groups[0]["lr"] = 0.5
    t.optimizer.param_groups[1]["weight_decay"] = 0.3


def widened(t):
    for i in (6, 220):
        t.params[i].data = t.params[i].detach().double()
        t.params[i].grad = torch.ones_like(t.params[i])


def counted(t):
    for i in (8, 210):
        t.state(i)["step"].fill_(10)
        t.state(i)["exp_avg"].mul_(2)


def shortened(t):
    t.optimizer.param_groups[0]["params"].pop(11)


def switched(t):
    t.optimizer.param_groups[0]["amsgrad"] = True


CHANGES = [
    replaced, swapped, renamed, reordered, extended, emptied, moved, strided, strided_gradients, frozen, all_frozen,
    tuned, widened, counted, shortened, switched,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["plain", "clip"])
def test_a_change_between_steps(change, clip):
    pair = []
    for long in (False, True):
        t = Training(gdbp.optim.AdamW, long, max_grad_norm=clip)
        for step in range(5):
            t.give(step + 1)
            if step == 2:
                change(t)
            t.optimizer.step()
        pair.append(t.tensors())
    short, long = pair
    assert len(short) == len(long)
    for a, b in zip(short, long):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("cls, options", [("SGD", {}), ("SGD", {"momentum": 0.9}), ("NAdam", {}), ("RMSprop", {})])
def test_other_rules(cls, options):
    pair = [Training(getattr(gdbp.optim, cls), long, **options) for long in (False, True)]
    for t in pair:
        frozen(t)  # their first step comes later
        for step in range(3):
            t.optimizer.step()
            t.give(step + 2)
        t.optimizer.step()
    for a, b in zip(*(t.tensors() for t in pair)):
        assert torch.equal(a, b)


def test_versions_and_threads():
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            t = Training(gdbp.optim.AdamW, False)
            t.optimizer.step()
            t.params[3].grad = None
            versions = [x._version for x in t.tensors()]
            still = {id(x) for x in (t.params[3], *t.state(3).values())}
            t.optimizer.step()
        finally:
            torch.set_num_threads(before)
        assert all(x._version == v + (id(x) not in still) for x, v in zip(t.tensors(), versions))
        results.append(t.tensors())
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("grad", ["sparse", "another shape"])
def test_a_refusal_changes_nothing(grad):
    t = Training(gdbp.optim.AdamW, False)
    t.optimizer.step()
    p = t.params[297]
    if grad == "sparse":
        p.grad = torch.ones_like(p).to_sparse()
    else:
        p.data = torch.zeros(2, 2)
    before = [x.detach().clone() for x in t.tensors()]
    with pytest.raises(RuntimeError, match="expected"):
        t.optimizer.step()
    assert all(map(torch.equal, before, t.tensors()))


def test_gradients_live_no_longer_than_the_step():
    t = Training(gdbp.optim.AdamW, False, max_grad_norm=1.0)
    t.optimizer.step()
    gone = weakref.ref(t.params[0].grad)
    t.params[0].grad = None
    assert gone() is None


@pytest.mark.parametrize(
    "name, options",
    [
        ("RMSprop", {"momentum": 0.9, "centered": True}),
        ("AdamW", {"l1": 0.01}),
        ("Lion", {"weight_decay": 0.1}),
        ("SGD", {}),
    ],
)
def test_an_update_does_not_depend_on_where_an_element_lies(name, options):
    """In the body of a loop or in what is left over behind it."""
    start, grads = torch.randn(83), [torch.randn(83) for _ in range(3)]
    results = []
    for size in (83, 1, 7, 13, 64):
        params = [torch.nn.Parameter(part.clone()) for part in start.split(size)]
        optimizer = getattr(gdbp.optim, name)(params, lr=0.01, **options)
        for gradient in grads:
            for p, part in zip(params, gradient.split(size)):
                p.grad = part.clone()
            optimizer.step()
        results.append(torch.cat([p.detach() for p in params]))
    assert all(torch.equal(result, results[0]) for result in results)
