"""What would a step take on chips that are not here? Compiles it for each, one after another.

    python -m experiments.compiled v5e v6e v5p         # the extra 'tpu'
    python -m experiments.compiled h100 a100 b200      # the extra 'cuda12'
    python -m experiments.compiled --table

Each estimate of `python -m unified_mm.compile` is written to experiments/results/compiled as it
comes, and what is there is not compiled again. An H200 has an H100's processors, hence its
programs: its rows are reckoned from those, by its own bandwidth and memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from unified_mm.costs.chips import CHIPS, Gpu
from unified_mm.costs.roofline import Roofline, utilisation
from unified_mm.files import write_json

RESULTS = Path(__file__).with_name("results") / "compiled"
ROWS = [(size, chips) for size in ("base", "large") for chips in (1, 8)]
ROWS += [("large", 64), ("10b", 64), ("10b", 256)]
SHAPES = {1: "1", 8: "8", 64: "8x8", 256: "32x8"}  # GPUs, or hosts and GPUs of each
TORI = {
    2: {1: "1x1", 8: "2x4", 64: "8x8", 256: "16x16"},
    3: {1: "1x1x1", 8: "2x2x2", 64: "4x4x4", 256: "4x8x8"},
}
# Examples of a chip and step, alike for all of a kind: what fits into the smallest one.
GPU_BATCH = {"base": 256, "large": 128, "10b": 16}
TPU_BATCH = {"base": 64, "large": 8, "10b": 16}
# `large` is divided within a host, where links are fast; of `10b` a host has no room for that.
OF_HOSTS = ("--config.mesh.data=8", "--config.mesh.fsdp=8")
TWINS = {"h200": "h100"}  # whose programs are another's


def main() -> int:
    """Compiles what is missing of some chips, or prints the table of what is kept."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("chips", nargs="*", metavar="CHIP")
    parser.add_argument("--table", action="store_true", help="print what is kept, compile nothing")
    given = parser.parse_args()
    if given.table == bool(given.chips):
        parser.error("give the chips to compile for, or --table")
    for chip in given.chips:
        if chip not in CHIPS or chip in TWINS:
            parser.error(
                f"{chip}: there are {', '.join(name for name in CHIPS if name not in TWINS)}"
            )
    if given.table:
        print(table(RESULTS))
        return 0
    for chip in given.chips:
        for size, chips in ROWS:
            path = RESULTS / f"{size}_{chip}_{chips}.json"
            if not path.exists():
                print(f"{path.stem}:", end=" ", flush=True)
                write_json(path, compiled(chip, size, chips))
                print("written", flush=True)
    return 0


def compiled(chip: str, size: str, chips: int) -> dict[str, Any]:
    """Returns what `unified_mm.compile` says of a step, also of one that does not fit.

    Raises:
      RuntimeError: it ended otherwise; the message has its last words.
    """
    known: Any = CHIPS[chip]
    shapes = SHAPES if isinstance(known, Gpu) else TORI[known.dimensions]
    batch = (GPU_BATCH if isinstance(known, Gpu) else TPU_BATCH)[size] * chips
    hosts = OF_HOSTS if isinstance(known, Gpu) and (size, chips) == ("large", 64) else ()
    fields = (f"--config.train.batch_size={batch}", "--config.model.dtype=bfloat16", *hosts)
    command = [sys.executable, "-m", "unified_mm.compile", f"--config=configs/coco.py:{size}"]
    done = subprocess.run(
        [*command, f"--topology={chip}:{shapes[chips]}", *fields], capture_output=True, text=True
    )
    last = done.stdout.strip().rpartition("\n")[2]
    if not last.startswith("{"):
        raise RuntimeError(f"{chip}, {size}, {chips}: {done.stderr[-2000:]}")
    return json.loads(last)


def table(kept: Path) -> str:
    """Returns a table of the estimates in a folder, one line for each program."""
    columns = ("", "chip", "mesh", "batch", "memory, GB", "least step, ms", "MFU", "bound by")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for size, chips in ROWS:
        for chip in CHIPS:
            path = kept / f"{size}_{TWINS.get(chip, chip)}_{chips}.json"
            if path.exists():
                facts = json.loads(path.read_text())
                if chip in TWINS:
                    facts = reckoned(facts, chip)
                lines.append(f"| {' | '.join(cells(size, chip, facts))} |")
    return "\n".join(lines)


def reckoned(facts: dict[str, Any], chip: str) -> dict[str, Any]:
    """Returns the estimate of another chip with the same programs and links."""
    other = CHIPS[chip]
    memory = int(other.memory * facts["memory_share"])
    if facts["traffic_bytes"] is None:  # the compiler refused, and said of a part what it needs
        return facts | {"memory_bytes": memory}
    found = facts | {"memory_bytes": memory, "fits": facts["peak_bytes"] <= memory}
    least = Roofline(
        facts["computed_flops"] / facts["chips"] / other.flops,
        facts["traffic_bytes"] / other.memory_bandwidth,
        facts["collective_seconds"],
    )
    both = {"mfu": least.step, "serial_mfu": least.serial}
    shares = {
        name: utilisation(other, facts["chips"], facts["flops"], step)
        for name, step in both.items()
    }
    seconds = {"step_seconds": least.step, "serial_seconds": least.serial, "bound": least.bound}
    return found | seconds | shares


def cells(size: str, chip: str, facts: dict[str, Any]) -> list[str]:
    """Returns the cells of a line."""
    mesh = " x ".join(f"{axis} {count}" for axis, count in facts["mesh"].items() if count > 1)
    memory = f"{facts['peak_bytes'] / 1e9:.1f} of {facts['memory_bytes'] / 1e9:.1f}"
    name = f"{facts['chips']} {chip}"
    begun = [size, name, mesh or "1", f"{facts['batch_size']:,}"]
    if not facts["fits"]:
        return [*begun, f"{memory}: does not fit", "", "", ""]
    both = [(facts["step_seconds"], facts["mfu"]), (facts["serial_seconds"], facts["serial_mfu"])]
    if facts["chips"] == 1:
        both = both[:1]
    least = " / ".join(f"{1e3 * seconds:.4g}" for seconds, _ in both)
    share = " / ".join(f"{mfu:.2f}" for _, mfu in both)
    return [*begun, memory, least, share, facts["bound"]]


if __name__ == "__main__":
    sys.exit(main())
