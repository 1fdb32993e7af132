"""Checks in another process: what crashes or hangs there is one failed check here."""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from gdbp.testing.report import FAIL, Check, one_line
from gdbp.testing.suite import Suite

_SECONDS = 180.0  # for one check; the slowest takes a few


def run_all(suite: Suite, cls: type, arguments: tuple) -> list[Check]:
    """All checks of the suite, in another process where that can import the class."""
    found = _run_isolated(suite, cls, arguments)
    return [suite.run(name, cls, arguments) for name in suite.checks] if found is None else found


def _run_isolated(suite: Suite, cls: type, arguments: tuple) -> list[Check] | None:
    if cls.__module__ == "__main__":
        return None
    try:
        subject = pickle.dumps((cls, arguments))
    except Exception:
        return None
    names, found = list(suite.checks), []
    while len(found) < len(names):
        worker = _Worker(suite.module, subject, names[len(found) :])
        started = False
        for result in worker.results():
            started = True
            if result is not None:
                found.append(result)
        if not started:
            return None
        if len(found) < len(names):
            found.append(Check(names[len(found)], FAIL, worker.death()))
    return found


class _Worker:
    """A process that runs checks from one on; gdbp/testing/worker.py is what it runs."""

    def __init__(self, suite: str, subject: bytes, names: list[str]):
        self._reader, writer = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (the process and death() need it)
        self._late = False
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "gdbp.testing.worker", str(writer)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            pass_fds=[writer],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        os.close(writer)
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(pickle.dumps((suite, subject, names)))

    def results(self) -> Iterator[Check | None]:
        """None once the class is imported, then every check as it ends, until the process does."""
        with os.fdopen(self._reader, "rb", buffering=0) as stream:
            waiting = b""
            while True:
                if not select.select([stream], [], [], _SECONDS)[0]:
                    self._late = True
                    self._process.kill()
                chunk = stream.read(1 << 16)
                if not chunk:
                    break
                *lines, waiting = (waiting + chunk).split(b"\n")
                for line in lines:
                    yield pickle.loads(bytes.fromhex(line.decode()))
        self._process.wait()

    def death(self) -> str:
        """Why the process ended before its last check."""
        if self._late:
            return f"not done after {_SECONDS:.0f} s"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        fatal = [line for line in lines if line.startswith(("Fatal", "terminate"))]
        lines = fatal or [line for line in lines if line][-1:]
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        return one_line(f"the process was {how}: {lines[0]}" if lines else f"the process was {how}")
