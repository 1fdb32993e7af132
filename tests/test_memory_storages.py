"""What torch and its neighbours do with CPU storages, the same with the CPU cache and without."""

import gc
import os

import numpy as np
import pytest
import torch

from gdbp import memory

MIB = 2**20


@pytest.fixture
def cache():
    with memory.cpu_cache():
        yield


@pytest.fixture(params=["off", "on"])
def either(request):
    """With the cache, and without as it is to be."""
    if request.param == "off":
        yield
        return
    with memory.cpu_cache():
        yield


def block(size=MIB, value=0):
    return torch.full((size,), value, dtype=torch.uint8)


def test_numpy(either):
    tensor = torch.arange(2.0**18)
    array = tensor.numpy()
    del tensor
    gc.collect()
    others = [torch.zeros(2**18) for _ in range(3)]
    assert (array == np.arange(2.0**18)).all()
    back = torch.from_numpy(array)
    del array
    assert back[-1] == 2**18 - 1 and len(others) == 3


def test_dlpack(either):
    tensor = torch.arange(2.0**18)
    array = np.from_dlpack(tensor)
    other = torch.from_dlpack(tensor)
    address = tensor.data_ptr()
    del tensor
    assert torch.zeros(2**18).data_ptr() != address
    assert array[-1] == other[-1] == 2**18 - 1


def test_resize(either):
    tensor = torch.arange(2.0**15)
    for size in (2**17, 2**14, 0, 2**16):
        tensor.resize_(size)
    tensor.untyped_storage().resize_(2**20)
    assert (tensor[: 2**14] == torch.arange(2.0**14)).all()
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().size() == 0


def test_shared_memory(either):
    tensor = torch.arange(2.0**18)
    assert tensor.share_memory_() is tensor and tensor.is_shared()
    assert tensor[-1] == 2**18 - 1


def test_copy_on_write(either):
    tensor = torch.arange(2.0**18)
    lazy = torch._lazy_clone(tensor)
    lazy[0] = 7
    assert tensor[0] == 0 and lazy[0] == 7 and lazy[-1] == 2**18 - 1


def test_file(either, tmp_path):
    path = tmp_path / "numbers"
    np.arange(2.0**16).tofile(path)
    tensor = torch.from_file(str(path), size=2**16, dtype=torch.float64)
    assert tensor[-1] == 2**16 - 1
    tensor.set_(torch.ones(2**16, dtype=torch.float64))
    assert tensor.sum() == 2**16


def test_serialization(either, tmp_path):
    torch.save(torch.arange(2.0**18), tmp_path / "t.pt")
    for mmap in (False, True):
        assert torch.load(tmp_path / "t.pt", mmap=mmap)[-1] == 2**18 - 1


def test_pinned_memory(either):
    tensor = torch.ones(2**18)
    assert not tensor.is_pinned()
    if torch.cuda.is_available():
        assert tensor.pin_memory().is_pinned()


class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2**16,), float(index)) * torch.full((2**16,), float(index))


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_data_loader_workers(cache, strategy):
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        batches = list(torch.utils.data.DataLoader(Squares(), batch_size=2, num_workers=2))
    finally:
        torch.multiprocessing.set_sharing_strategy(before)
    assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [4, 9], [16, 25], [36, 49]]


def test_fork(cache):
    tensor = block(value=4)
    block(2 * MIB)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # OpenMP's threads are not in the child
        good = tensor.eq(4).all().item()
        tensor.fill_(5)
        del tensor
        again = block(2 * MIB, 6)
        memory.empty_cpu_cache()
        os._exit(not (good and again.eq(6).all().item()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert tensor.eq(4).all()


def profiled():
    def work():
        return torch.ones(2**18).add(1).sum()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as new:
        work()
    with torch.autograd.profiler.profile(profile_memory=True) as old:
        work()
    recorded = [e.nbytes() for e in new.profiler.kineto_results.events() if e.name() == "[memory]"]
    usage = [
        {event.key: event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage}
        for profile in (new, old)
    ]
    return recorded, usage


def test_the_profiler_sees_the_same_with_and_without():
    expected = profiled()
    assert expected[0] and all(expected[1])
    with memory.cpu_cache():
        assert profiled() == expected
