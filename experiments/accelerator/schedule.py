"""Parts that share minutes: each in a process of its own, its rows written as they come."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unified_mm.files import read_json, write_json

Row = dict[str, Any]
Rows = Mapping[str, Callable[[], Row]]  # by name, what measures it

FAILED = "failed"  # the key of a row that holds a traceback in place of what was to be measured
LATE = 0.5  # of its share that a part may take beyond it, to end the row that it is at
LEAST = 5.0  # seconds below which no part begins
GRACE = 15.0  # seconds between the request to end and the end


@dataclass(frozen=True)
class Part:
    """A part of the whole.

    Attributes:
      name: of the part.
      share: of the minutes, relative to those of the other parts.
      rows: `module:function` of a `Setting` -> `Rows`, in the order of their worth.
    """

    name: str
    share: float
    rows: str


class Results:
    """What was found so far, in one file; one process at a time writes it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def part(self, name: str) -> dict[str, Any]:
        """Returns what is known of a part: its `state` and its `rows`."""
        parts = read_json(self._file)["parts"] if self._file.exists() else {}
        found: dict[str, Any] = parts.get(name, {"state": "", "rows": {}})
        return found

    def rows(self, part: str) -> dict[str, Row]:
        """Returns the rows of a part that were measured, without those that failed."""
        found = self.part(part)["rows"]
        return {name: row for name, row in found.items() if FAILED not in row}

    def put(self, part: str, name: str, row: Row) -> None:
        """Writes a row."""
        known = self.part(part)
        self._write(part, known | {"rows": known["rows"] | {name: row}})

    def close(self, part: str, state: str) -> None:
        """Writes how a part ended."""
        self._write(part, self.part(part) | {"state": state})

    def _write(self, part: str, content: Mapping[str, Any]) -> None:
        whole = read_json(self._file) if self._file.exists() else {"parts": {}}
        write_json(self._file, {**whole, "parts": {**whole["parts"], part: content}})


def run_parts(
    parts: Sequence[Part],
    results: Results,
    seconds: float,
    command: Callable[[Part, float], Sequence[str]],
    say: Callable[[str], None],
) -> bool:
    """Runs the parts that are not done, each within its share of the time that is left.

    What a part does not need is the others', and so is what it takes beyond its share.

    Args:
      parts: in order.
      results: where they write, and how each ended is written.
      seconds: for all together.
      command: starts a part, given the seconds after which it begins no further row.
      say: takes a line of news.

    Returns:
      Whether all are done.
    """
    ending = time.monotonic() + seconds
    for at, part in enumerate(parts):
        if results.part(part.name)["state"] == "done":
            say(f"{part.name}: done before")
            continue
        missing = [each for each in parts[at:] if results.part(each.name)["state"] != "done"]
        left = ending - time.monotonic()
        if left < LEAST:
            say(f"{part.name}: skipped, the time is spent; the same command goes on with it")
            results.close(part.name, "skipped")
            continue
        share = left * part.share / sum(each.share for each in missing)
        say(f"{part.name}: at most {share:.0f} of {left:.0f} seconds")
        state = ended(command(part, share), min(left, share * (1 + LATE)))
        if state == "done" and (failed := failures(results, part)):
            state = "failed"
            say(f"{part.name}: failed: {', '.join(failed)}")
        say(f"{part.name}: {state}")
        results.close(part.name, state)
    return all(results.part(part.name)["state"] == "done" for part in parts)


def failures(results: Results, part: Part) -> list[str]:
    """Returns the rows of a part that failed."""
    return [name for name, row in results.part(part.name)["rows"].items() if FAILED in row]


SKIPPED = 3  # the exit code of a part that began less than all of its rows


def ended(command: Sequence[str], most: float) -> str:
    """Runs a process and returns how it ended; after `most` seconds it is ended.

    It has a process group of its own, so that what it started ends with it, and the session of
    this process, so that it does not outlive whoever ends that.
    """
    process = subprocess.Popen(command, process_group=0)
    try:
        code = process.wait(most)
    except subprocess.TimeoutExpired:
        end_group(process)
        return "cut"
    except BaseException:
        end_group(process)
        raise
    words = {0: "done", SKIPPED: "skipped in part"}
    return words.get(code, f"failed with exit code {code}")


def end_group(process: subprocess.Popen[Any]) -> None:
    """Ends a process and all of its group: asks first, then insists."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


def measure_rows(
    part: str, rows: Rows, results: Results, seconds: float, say: Callable[[str], None]
) -> int:
    """Measures the rows of a part that are missing, one after another, and writes each.

    Returns:
      The exit code of the part: 0, or `SKIPPED` where no time was left for some.
    """
    ending = time.monotonic() + seconds
    skipped = []
    for name, measure in rows.items():
        if name in results.rows(part):
            continue
        if time.monotonic() > ending:
            skipped.append(name)
            continue
        began = time.monotonic()
        try:
            row = measure()
            json.dumps(row, allow_nan=False)  # what cannot be written was not measured
        except Exception:
            row = {FAILED: traceback.format_exc()}
            say(row[FAILED])
        results.put(part, name, {**row, "took_seconds": round(time.monotonic() - began, 1)})
        say(f"{part}, {name}: {short(row)}")
    if skipped:
        say(f"{part}: its share is spent; skipped: {', '.join(skipped)}")
    return SKIPPED if skipped else 0


def short(row: Row) -> str:
    """Returns what a row holds as a line, without lists and groups."""
    if FAILED in row:
        return FAILED
    plain = {key: value for key, value in row.items() if not isinstance(value, dict | list)}
    return ", ".join(f"{key} {value}" for key, value in plain.items())
