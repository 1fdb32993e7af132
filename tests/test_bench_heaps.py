"""The comparison of heaps, a process for each."""

import json

import pytest

from benchmarks import heaps


def test_heaps_are_measured_in_processes_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(heaps, "heaps", lambda: {name: heaps.HEAPS[name] for name in (heaps.COLD, "gdbp")})
    file = tmp_path / "heaps" / "cpu.json"
    assert heaps.main(["--smoke", "--rounds", "1", "-k", "empty 64 B", "--json", str(file)]) == 0
    assert "| empty 64 B |" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["heaps"].keys() == {heaps.COLD, "gdbp"}
    assert all(of["ms"] > 0 and of["faults"] > 0 for of in row["heaps"].values())
    assert heaps.main(["-k", "nothing of that name"]) == 2
    assert "training" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="ended with status 3"):
        heaps.measure(["-c", "raise SystemExit(3)"], {}, 1)
