"""``python -m gdbp`` itself: whose help a refusal names, and how a command ends that is interrupted or not read."""

import os
import signal
import subprocess
import sys
import time

import pytest

from gdbp import _bench
from gdbp.__main__ import main
from gdbp._command import try_to_write
from gdbp._errors import InputError


def start(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "gdbp", *arguments]
    return subprocess.Popen(command, cwd=_bench.ROOT, stderr=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize(
    "arguments, command",
    [
        (["--colour"], "python -m gdbp"),
        (["info", "--colour"], "python -m gdbp info"),
        (["train", "--colour", "red"], "python -m gdbp train"),
        (["check", "torch.optim.SGD", "--colour"], "python -m gdbp check"),
        (["bench", "run", "--colour"], "python -m gdbp bench run"),
    ],
)
def test_a_refusal_names_the_help_of_its_command(arguments, command, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.endswith(f"; see {command} --help\n")


def test_a_full_disk_is_one_sentence():
    with open("/dev/full", "w") as full, start("info", stdout=full) as child:
        assert child.stderr.read() == "gdbp: the output can't be written (No space left on device); free some space\n"
    assert child.returncode == 2


@pytest.mark.parametrize("arguments", [["info"], ["train", "--help"], ["bench", "list"]], ids=" ".join)
def test_a_pipe_that_nobody_reads_ends_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    with start(*arguments, stdout=writer) as child:
        os.close(writer)
        assert child.stderr.read() == ""
    assert child.returncode in (0, 128 + signal.SIGPIPE)  # 0: argparse makes nothing of a help that can't be shown


@pytest.mark.parametrize("seconds", [0.3, 1.2, 4])
def test_an_interruption_shows_no_traceback_and_leaves_nothing(seconds, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background may ignore it
    with start("train", "--epochs", "20000", "--out", str(tmp_path / "run"), "--quiet") as child:
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        assert child.stderr.read() in ("", "gdbp: interrupted\n")
    assert child.returncode in (-signal.SIGINT, 130)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\0", "a\0/b.json", "file/b.json", "new/folder/" + 300 * "n"])
def test_trying_to_write_leaves_nothing_behind(name, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"can't be written to \(.*\); choose another place"):
        try_to_write(tmp_path / name)
    try_to_write(tmp_path / "new" / "folder" / "b.json")
    try_to_write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"
