"""A run of the main command as the sweep sees it, in milliseconds: `stand_in_run.py FOLDER CONFIG`.

It imports no jax. It takes the run's lock, goes on from its last step, writes metrics, and its
result last. On SIGTERM it saves and ends with 143. A file FOLDER.fails makes it fail half-way;
FOLDER.slow makes it slow.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from unified_mm.files import read_json, write_json
from unified_mm.runs.folder import RunFolder

STEPS = 10


def main() -> None:
    folder, given = RunFolder(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with folder.lock():
        train(folder, *given)


def train(folder: RunFolder, config: dict, defaults: dict) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    folder.create_or_check(config, defaults)
    saved = folder.path / "saved.json"
    start = read_json(saved) if saved.exists() else 0
    beside = str(folder.path)
    with open(folder.path / "starts", "a") as file:
        file.write(f"{start}\n")
    steps = config["train"]["steps"]
    for step in range(start + 1, steps + 1):
        time.sleep(0.1 if os.path.exists(f"{beside}.slow") else 0.005)
        loss = (1.0 + 1000 * config["train"]["learning_rate"]) / step
        line = {"step": step, "loss": loss, "time/steps_per_second": 100.0}
        with open(folder.metrics, "a") as file:
            file.write(json.dumps(line) + "\n")
        write_json(saved, step)
        if os.path.exists(f"{beside}.fails") and step == steps // 2:
            print("first words\nthe loss is on fire", file=sys.stderr)
            sys.exit(1)
        if stopped:
            sys.exit(143)
    score = config["seed"] + 1000 * config["train"]["learning_rate"]
    write_json(folder.result, {"steps": steps, "scores": {"caption/nats": score}})


if __name__ == "__main__":
    main()
