"""A table of compiled programs says what the estimates do, each of which is made once."""

import json
import subprocess

import pytest

from experiments import compiled
from unified_mm.files import write_json

FACTS = {
    "chips": 8,
    "mesh": {"data": 1, "fsdp": 8},
    "batch_size": 1024,
    "memory_share": 0.75,
    "memory_bytes": 64 * 10**9,
    "peak_bytes": 25 * 10**9,
    "flops": int(8 * 989e12 * 0.05),
    "computed_flops": int(8 * 989e12 * 0.06),
    "traffic_bytes": int(3352e9 * 0.1),
    "collective_seconds": 0.02,
    "step_seconds": 0.1,
    "serial_seconds": 0.12,
    "bound": "memory",
    "mfu": 0.5,
    "serial_mfu": 0.05 / 0.12,
    "fits": True,
}


def test_the_table_has_an_h200_by_the_h100s_program(tmp_path):
    write_json(tmp_path / "large_h100_8.json", FACTS)
    lines = compiled.table(tmp_path).splitlines()
    assert lines[2] == (
        "| large | 8 h100 | fsdp 8 | 1,024 | 25.0 of 64.0 | 100 / 120 | 0.50 / 0.42 | memory |"
    )
    # 335.2 GB at 4,800 GB/s are 69.8 ms, and 20 ms more where collectives are waited for.
    assert lines[3] == (
        "| large | 8 h200 | fsdp 8 | 1,024 | 25.0 of 113.5 | 69.83 / 89.83 | 0.72 / 0.56 | memory |"
    )


def test_a_program_that_does_not_fit_has_no_times(tmp_path):
    refused = dict.fromkeys(("traffic_bytes", "collective_seconds", "step_seconds"))
    # What the compiler says of a refused program may be of a part, or nothing.
    for size, peak in (("base", 0), ("large", 80 * 10**9)):
        facts = FACTS | refused | {"fits": False, "peak_bytes": peak}
        write_json(tmp_path / f"{size}_h100_1.json", facts)
    lines = compiled.table(tmp_path).splitlines()[2:]
    assert len(lines) == 4
    assert all("does not fit" in line and "memory |" not in line for line in lines)


def test_each_program_is_compiled_once_and_kept(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, f"said\n{json.dumps(FACTS)}\n", "")

    monkeypatch.setattr(compiled.subprocess, "run", run)
    monkeypatch.setattr(compiled, "RESULTS", tmp_path)
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["compiled", "v5p", "h100"])
        compiled.main()
    assert len(asked) == 2 * len(compiled.ROWS)
    assert "--topology=v5p:2x2x2" in asked[1] and "--config.train.batch_size=512" in asked[1]
    assert "--topology=h100:8x8" in asked[11] and "--config.mesh.data=8" in asked[11]
    monkeypatch.setattr("sys.argv", ["compiled", "h200"])  # an H100's
    with pytest.raises(SystemExit):
        compiled.main()


def test_what_ends_without_an_estimate_is_no_result(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ValueError: needs the extra")
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="v5e, base, 1: ValueError: needs the extra"):
        compiled.compiled("v5e", "base", 1)
