"""The process in which checks run: reads what to check from its input, writes results to a pipe."""

import os
import pickle
import sys

from gdbp.testing import optimizer  # noqa: F401  (fills CHECKS)
from gdbp.testing.registry import run_check


def main() -> None:
    pipe = int(sys.argv[1])

    def send(result) -> None:
        os.write(pipe, pickle.dumps(result).hex().encode() + b"\n")

    subject, names = pickle.loads(sys.stdin.buffer.read())
    cls, kwargs = pickle.loads(subject)
    send(None)
    for name in names:
        send(run_check(name, cls, kwargs))


if __name__ == "__main__":
    main()
