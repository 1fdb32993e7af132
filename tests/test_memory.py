"""The caching CPU allocator under torch: what it keeps, what it counts, and that nothing else notices."""

import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gdbp
from gdbp import memory
from gdbp.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SMALLEST = 2**15  # that the cache takes


@pytest.fixture(autouse=True)
def _off_afterwards():
    memory.disable_cpu_cache()
    yield
    memory.disable_cpu_cache()


@pytest.fixture
def cache():
    memory.enable_cpu_cache()
    memory.reset_peak_memory_stats()


def stat(name):
    return memory.cpu_memory_stats()[name]


def cached():
    return stat("cached_bytes.all.current")


def in_use():
    return stat("allocated_bytes.all.current")


def block(size=MIB, value=None):
    tensor = torch.empty(size, dtype=torch.uint8)
    return tensor if value is None else tensor.fill_(value)


def run(script, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_off_unless_asked_for():
    before = memory.cpu_memory_stats()
    block()
    assert memory.cpu_memory_stats() == before


def test_a_freed_block_is_the_next_tensor(cache):
    first = block(value=5)
    address = first.data_ptr()
    del first
    assert cached() == MIB
    hits = stat("num_hits")
    assert block().data_ptr() == address
    assert stat("num_hits") == hits + 1


@pytest.mark.parametrize("size", [0, 1, 64, 1000, SMALLEST - 1])
def test_small_blocks_are_left_to_malloc(cache, size):
    before = memory.cpu_memory_stats()
    tensor = block(size)
    assert tensor.data_ptr() % 64 == 0 and (size == 0) == (tensor.data_ptr() == 0)
    del tensor
    assert memory.cpu_memory_stats() == before


@pytest.mark.parametrize("size", [SMALLEST, SMALLEST + 1, 100_000, MIB - 1, MIB, 2 * MIB + 1, 7 * MIB + 13, 33 * MIB])
def test_waste_is_bounded_and_every_byte_usable(cache, size):
    before = in_use()
    tensor = block(size, 3)
    assert size <= in_use() - before <= size * 9 / 8
    assert tensor.data_ptr() % 64 == 0
    assert tensor.view(torch.uint8).sum(dtype=torch.int64).item() == 3 * size


def test_statistics_of_a_step(cache):
    before = memory.cpu_memory_stats()
    a, b = block(MIB), block(2 * MIB)
    del a
    now = memory.cpu_memory_stats()
    assert now["allocated_bytes.all.current"] - before["allocated_bytes.all.current"] == 2 * MIB
    assert now["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"] == 3 * MIB
    assert now["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"] == 3 * MIB
    assert now["allocated_bytes.all.freed"] - before["allocated_bytes.all.freed"] == MIB
    assert now["reserved_bytes.all.current"] == now["allocated_bytes.all.current"] + now["cached_bytes.all.current"]
    assert now["num_misses"] - before["num_misses"] == 2
    memory.reset_peak_memory_stats()
    assert stat("allocated_bytes.all.peak") == in_use()
    del b


def test_names_are_those_of_torch_cuda(cache):
    amounts = {f"{kind}_bytes.all" for kind in ("allocated", "reserved")}
    names = {f"{amount}.{what}" for amount in amounts for what in ("current", "peak", "allocated", "freed")}
    ours = {"cached_bytes.all.current", "num_hits", "num_misses"}
    assert memory.cpu_memory_stats().keys() == names | ours | {"num_alloc_retries", "num_ooms"}


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_empty_gives_everything_back(cache):
    tensors = [block(8 * MIB, 1) for _ in range(8)]
    kept = tensors.pop()
    full = resident()
    del tensors
    assert cached() == 56 * MIB and resident() > full - 8 * MIB
    memory.empty_cpu_cache()
    assert cached() == 0 and resident() < full - 48 * MIB
    assert kept.eq(1).all()


@pytest.mark.parametrize("whole", [int, np.int64])
def test_the_limit_holds_and_gives_up_the_least_recently_used(whole):
    memory.enable_cpu_cache(max_bytes=whole(3 * MIB))
    tensors = [block() for _ in range(5)]
    addresses = [t.data_ptr() for t in tensors]
    while tensors:
        tensors.pop(0)
    assert cached() == 3 * MIB
    assert [t.data_ptr() for t in [block(), block(), block()]] == addresses[:1:-1]
    memory.enable_cpu_cache(max_bytes=0)
    assert cached() == 0
    del addresses
    block()
    assert cached() == 0


def test_going_over_to_no_limit_gives_up_what_is_beyond_use():
    memory.enable_cpu_cache(max_bytes=2**40)
    most = in_use() + 8 * MIB
    for size in range(1, 9):
        block(size * MIB)
    assert cached() == 36 * MIB
    memory.enable_cpu_cache()
    assert cached() > 0 and in_use() + cached() <= 1.25 * most


def test_without_a_limit_it_holds_a_quarter_more_than_was_in_use(cache):
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        sizes = torch.randint(SMALLEST, 6 * MIB, (6,), generator=generator).tolist()
        tensors = [block(size) for size in sizes]
        del tensors
        assert stat("reserved_bytes.all.peak") <= 1.25 * stat("allocated_bytes.all.peak")


def test_switching_off_while_tensors_live():
    memory.enable_cpu_cache()
    tensor, other = block(value=9), block(2 * MIB)
    del other
    memory.disable_cpu_cache()
    assert cached() == 0 and in_use() >= MIB and tensor.eq(9).all()
    counted = stat("num_misses")
    tensor.untyped_storage().resize_(4 * MIB)  # asks the allocator that the storage came from
    assert stat("num_misses") == counted and tensor.eq(9).all()
    before = torch.ones(MIB)
    memory.enable_cpu_cache()
    memory.enable_cpu_cache()
    del before, tensor  # those of the other allocator, in turn
    memory.disable_cpu_cache()
    memory.disable_cpu_cache()
    assert stat("reserved_bytes.all.current") == in_use()


def test_context_manager():
    with memory.cpu_cache():
        block()
        assert cached() == MIB
        with memory.cpu_cache(max_bytes=0):
            block()
            assert cached() == 0
        block()
        assert cached() == MIB  # on again, without the limit
    assert cached() == 0
    misses = stat("num_misses")
    with pytest.raises(ZeroDivisionError), memory.cpu_cache():
        raise ZeroDivisionError
    block()
    assert stat("num_misses") == misses


def test_keep_heap_is_the_same():
    assert gdbp.keep_heap is memory.enable_cpu_cache


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"max_bytes": -1}, ValueError, "max_bytes is -1"),
        ({"max_bytes": 2**63}, ValueError, "2\\*\\*63 - 1"),
        ({"max_bytes": 1e9}, TypeError, "max_bytes is 1000000000.0"),
        ({"max_bytes": True}, TypeError, "max_bytes is True"),
        ({"max_bytes": "4G"}, TypeError, "max_bytes is '4G'"),
        ({"huge_pages": 1}, TypeError, "huge_pages is 1"),
    ],
)
def test_bad_arguments_change_nothing(arguments, error, words):
    with pytest.raises(error, match=words):
        memory.enable_cpu_cache(**arguments)
    misses = stat("num_misses")
    block()
    assert stat("num_misses") == misses


def test_eight_threads(cache):
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        mine = []
        for i in range(300):
            size = int(torch.randint(1, 2**17, (1,), generator=generator))
            mine.append((i, torch.full((size,), float(i))))
            if len(mine) > 4:
                value, tensor = mine.pop(0)
                if tensor[0] != value or tensor[-1] != value:
                    wrong.append(value)
            if i % 100 == seed:
                memory.empty_cpu_cache()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    memory.empty_cpu_cache()
    assert stat("reserved_bytes.all.current") == in_use()


def gradients():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.GELU(), torch.nn.Linear(300, 100))
    optimizer = torch.optim.Adam(net.parameters())
    x, labels = torch.randn(256, 200), torch.randint(100, (256,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def test_training_is_the_same_bit_for_bit():
    expected = gradients()
    with memory.cpu_cache():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(), expected))


def test_a_step_in_its_stride_finds_everything_warm(cache):
    net = torch.nn.Sequential(torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10))
    optimizer = torch.optim.Adam(net.parameters())
    x, labels = torch.randn(128, 784), torch.randint(10, (128,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    misses = stat("num_misses")
    for _ in range(5):
        step()
    assert stat("num_misses") == misses


def test_many_sizes_are_served_from_a_quarter_more(cache):
    """What is free has other sizes than what is wanted: blocks are lent rather than given back for fresh ones."""
    features = [3, 32, 64, 64, 128]
    layers = [
        layer
        for shape in pairwise(features)
        for layer in (torch.nn.Conv2d(*shape, 3, padding=1), torch.nn.BatchNorm2d(shape[1]), torch.nn.ReLU())
    ]
    net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(128, 10))
    x, labels = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))

    def step():
        net.zero_grad()
        F.cross_entropy(net(x), labels).backward()

    for _ in range(4):
        step()
    before = memory.cpu_memory_stats()
    for _ in range(4):
        step()
    after = memory.cpu_memory_stats()
    hits, misses = (after[name] - before[name] for name in ("num_hits", "num_misses"))
    assert misses <= 0.1 * (hits + misses)
    assert after["reserved_bytes.all.peak"] <= 1.25 * after["allocated_bytes.all.peak"]


OUT_OF_MEMORY = """
import resource, torch, gdbp
gdbp.memory.enable_cpu_cache(max_bytes=2**31)
stats = gdbp.memory.cpu_memory_stats
def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
def error(size):
    try:
        torch.empty(size, dtype=torch.uint8)
    except RuntimeError as e:
        return type(e), str(e)
tensors = [torch.zeros(2**28, dtype=torch.uint8) for _ in range(2)]
limit = used() + 2**27
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
del tensors
assert stats()["cached_bytes.all.current"] == 2**29
fits = torch.zeros(2**29, dtype=torch.uint8)  # only once the cache is empty
assert stats()["cached_bytes.all.current"] == 0 and stats()["num_alloc_retries"] == 1, stats()
assert stats()["num_ooms"] == 0
ours = error(2**31)
assert stats()["num_ooms"] == 1, stats()
gdbp.memory.disable_cpu_cache()
assert ours == error(2**31) and ours is not None, ours
assert ours[1].endswith("you tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"), ours
# Small blocks are malloc's; what the cache keeps stands in their way all the same.
del fits
gdbp.memory.enable_cpu_cache()
torch.zeros(2**28, dtype=torch.uint8)
resource.setrlimit(resource.RLIMIT_AS, (used(), limit))
small = []
while stats()["cached_bytes.all.current"]:
    small.append(torch.empty(30_000, dtype=torch.uint8))
assert stats()["num_ooms"] == 1 and stats()["num_alloc_retries"] == 2, stats()
"""


def test_out_of_memory_empties_the_cache_and_then_raises_torchs_error():
    run(OUT_OF_MEMORY)


OTHER_ALLOCATOR = """
import ctypes, sys, pytest, torch, gdbp
c10 = ctypes.CDLL("libc10.so")
get, put = c10._ZN3c1015GetCPUAllocatorEv, c10._ZN3c1015SetCPUAllocatorEPNS_9AllocatorEh
default, mobile = c10._ZN3c1022GetDefaultCPUAllocatorEv, c10._ZN3c1028GetDefaultMobileCPUAllocatorEv
for function in (get, default, mobile):
    function.restype = ctypes.c_void_p
put.argtypes = [ctypes.c_void_p, ctypes.c_uint8]
"""


@pytest.mark.parametrize("priority", [0, 1])
@pytest.mark.parametrize("other", ["mobile", "default"])
def test_another_allocator_stays(other, priority):
    """A foreign one at any priority; and torch's own at one that we do not reach."""
    refused = other == "mobile" or priority > 0
    run(f"""{OTHER_ALLOCATOR}
put({other}(), {priority})
if {refused}:
    with pytest.raises(RuntimeError, match="another library has registered"):
        gdbp.memory.enable_cpu_cache()
    assert get() == {other}()
    block = torch.ones(2**20)
    assert gdbp.memory.cpu_memory_stats()["num_misses"] == 0
    gdbp.memory.disable_cpu_cache()
else:
    gdbp.memory.enable_cpu_cache()
    assert get() != {other}()
    gdbp.memory.disable_cpu_cache()
assert get() == {other}()
""")


def test_an_allocator_that_comes_later_stays_too():
    run(f"""{OTHER_ALLOCATOR}
gdbp.memory.enable_cpu_cache()
tensor = torch.ones(2**20)
put(mobile(), 0)
gdbp.memory.disable_cpu_cache()
assert get() == mobile() and tensor.sum() == 2**20
""")


IS_ON = """
import torch, gdbp
torch.empty(2**20)
print("on" if gdbp.memory.cpu_memory_stats()["num_misses"] else "off")
"""


@pytest.mark.parametrize("choice, state", [("1", "on"), ("0", "off"), ("", "off"), ("yes", "off")])
def test_environment(choice, state):
    done = run(IS_ON, GDBP_CPU_CACHE=choice)
    assert done.stdout.split() == [state]
    assert ("GDBP_CPU_CACHE is 'yes'; expected 0 or 1" in done.stderr) == (choice == "yes")


@pytest.fixture
def table(tmp_path):
    """A set of 600 samples, whose full-batch activations are large enough for the cache."""
    x = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    np.savez(tmp_path / "table.npz", x=x, y=x.sum(1))
    return ["--data", str(tmp_path / "table.npz"), "--hidden", "64", "--method", "batch", "--epochs", "3"]


@pytest.mark.parametrize("choice, uses_it", [(None, True), ("1", True), ("0", False)])
def test_training_from_the_command_line_asks_for_it(choice, uses_it, table, tmp_path, monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    if choice is not None:
        monkeypatch.setenv(memory.VARIABLE, choice)
    hits = stat("num_hits")
    assert main(["train", "--quiet", "--out", str(tmp_path / "run"), *table]) == 0
    assert (stat("num_hits") > hits) == uses_it
    hits = stat("num_hits")
    block(), block()
    assert stat("num_hits") == hits  # off again


def test_training_leaves_a_cache_on_as_it_is(table, tmp_path):
    memory.enable_cpu_cache(max_bytes=MIB)
    assert main(["train", "--quiet", "--out", str(tmp_path / "run"), *table]) == 0
    for _ in range(3):
        tensors = [block(), block()]
        del tensors
    assert cached() <= MIB and stat("num_hits")


def test_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(memory, "_C", None)
    monkeypatch.setattr(memory._load, "reason", "gdbp's compiled part is not there")
    with pytest.raises(RuntimeError, match=r"not there; in gdbp's source folder run: pip install"):
        memory.enable_cpu_cache()
    memory.disable_cpu_cache()
    memory.empty_cpu_cache()
    memory.reset_peak_memory_stats()
    assert memory.cpu_memory_stats() == {}
    with memory.cpu_cache_unless_refused():
        pass


def test_tensors_may_outlive_everything():
    run("""
import atexit, torch, gdbp
gdbp.memory.enable_cpu_cache()
kept = torch.ones(2**20)
torch.kept = kept
atexit.register(lambda: torch.ones(2**20))
""")
