"""What all tests share: seeds, two threads, programs in the background, and a count of the tests left out where there
is no GPU."""

import os
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

LEFT_OUT = pytest.StashKey[int]()
OUTCOMES = pytest.StashKey[dict[str, Future]]()

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _programs(request, tmp_path_factory):
    """What the programs of :mod:`tests.programs` will have answered."""
    wanted: dict = {}
    for item in request.session.items:
        if "outcome" in item.fixturenames:
            wanted.setdefault(item.module, []).append(item)
    outcomes = request.config.stash[OUTCOMES] = {}
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    for module, items in wanted.items():
        outcomes |= module.start(items, tmp_path_factory.mktemp("programs"), pool)
    yield
    pool.shutdown(cancel_futures=True)


@pytest.fixture
def outcome(request):
    return request.config.stash[OUTCOMES][request.node.nodeid].result()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request) -> str:
    return request.param


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "outcome" in getattr(item, "fixturenames", ()))
    if torch.cuda.is_available():
        return
    needs_gpu = [item for item in items if item.get_closest_marker("cuda")]
    if needs_gpu:
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=needs_gpu)
        config.stash[LEFT_OUT] = len(needs_gpu)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"{count} tests were not run: they need a GPU, and torch sees none.")
