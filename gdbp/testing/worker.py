"""The process in which checks run: reads what to check from its input, writes results to a pipe."""

import importlib
import os
import pickle
import sys


def main() -> None:
    pipe = int(sys.argv[1])

    def send(result) -> None:
        os.write(pipe, pickle.dumps(result).hex().encode() + b"\n")

    module, subject, names = pickle.loads(sys.stdin.buffer.read())
    suite = importlib.import_module(module).SUITE
    cls, arguments = pickle.loads(subject)
    send(None)
    for name in names:
        send(suite.run(name, cls, arguments))


if __name__ == "__main__":
    main()
