"""Tests the serve command with many clients at once, some with broken requests.

    python -m experiments.load_test --run runs/answers --images DIR

Starts `python -m unified_mm.serve` on loopback, sends 2,000 mixed requests from 32 clients, one in
twenty of them broken, and compares every good answer with that of the model itself. Writes
`experiments/results/load_test.json`; the exit code is 1 if any answer was wrong or lost, or the
server's memory grew.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from experiments.load_requests import Asked, broken_requests, good_requests
from unified_mm.benchmarks.timing import percentiles, provenance
from unified_mm.files import write_json

RESULTS = Path(__file__).parent / "results"
PICTURES = 48  # that are indexed and asked about
WARM = 300  # requests before memory is looked at
BROKEN = 0.05
GROWTH = 1.1  # of the process, that is no leak
PACKAGES = ("fastapi", "starlette", "uvicorn", "httpx")
MEMORY = {"rss_bytes": "process_resident_memory_bytes", "array_bytes": "unified_mm_array_bytes"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True, help="that captions, answers and retrieves")
    parser.add_argument("--images", type=Path, required=True, help="a folder of pictures")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where load_test.json goes")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pictures, index = Path(folder, "pictures"), Path(folder, "index")
        pictures.mkdir()
        for path in sorted(options.images.iterdir())[:PICTURES]:
            shutil.copy(path, pictures)
        make = ("unified_mm.index", "--run", options.run, "--images", pictures, "--out", index)
        subprocess.run([sys.executable, "-m", *map(str, make)], check=True, stdout=sys.stderr)
        good = good_requests(options.run, pictures, index)
        result = measure(options, good, index)
    write_json(options.results / "load_test.json", result)
    print(json.dumps(result))
    grown = result["memory_at_the_end"]["rss_bytes"] / result["memory_after_warm_up"]["rss_bytes"]
    return 1 if result["wrong"] or result["lost"] or grown > GROWTH else 0


def measure(options: argparse.Namespace, good: list[Asked], index: Path) -> dict[str, Any]:
    """Runs the whole test against one server, and returns the results."""
    rng = random.Random(0)
    order = mixed(good, options.requests, rng)
    with serving(options.run, index) as (url, process):
        load(url, mixed(good, WARM, rng), options.clients)
        before = memory(url)
        began = time.perf_counter()
        outcomes = load(url, order, options.clients)
        seconds = time.perf_counter() - began
        after = memory(url)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    wrong = [f"{each['kind']}: {each['wrong']}" for each in outcomes if each["wrong"]]
    lost = sum(not each["status"] for each in outcomes)
    origin = provenance()
    for line in wrong[:20]:
        print(f"WRONG: {line}", file=sys.stderr)
    return {
        "requests": len(order),
        "clients": options.clients,
        "broken": sum(each.broken for each in order),
        "answered": len(order) - lost,
        "lost": lost,
        "wrong": len(wrong),
        "asked_again": sum(each["again"] for each in outcomes),
        "statuses": dict(sorted(Counter(str(each["status"]) for each in outcomes).items())),
        "kinds": latencies(outcomes),
        "requests_per_second": round(len(order) / seconds, 1),
        "memory_after_warm_up": before,
        "memory_at_the_end": after,
        "exit_code": code,
        "run": Path(options.run).name,
        "cpus": os.cpu_count(),
        **origin,
        "versions": origin["versions"] | {name: metadata.version(name) for name in PACKAGES},
    }


def mixed(good: list[Asked], count: int, rng: random.Random) -> list[Asked]:
    """Returns `count` requests in random order, one in twenty of them broken, of all kinds."""
    bad = broken_requests()
    broken = round(BROKEN * count)
    chosen = [bad[i % len(bad)] for i in range(broken)]
    chosen += rng.choices(good, weights=[each.weight for each in good], k=count - broken)
    rng.shuffle(chosen)
    return chosen


@contextmanager
def serving(run: str, index: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Starts the serve command on a free port of loopback, and yields its address and process."""
    command = ("-m", "unified_mm.serve", "--run", run, "--index", str(index), "--port", "0")
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", file=sys.stderr)
                if line.startswith("serving at "):
                    yield line.split()[2], process
                    break
            else:
                raise SystemExit("the server did not start")
        finally:
            process.kill()


def load(url: str, order: list[Asked], clients: int) -> list[dict[str, Any]]:
    """Sends every request, from `clients` clients at a time, and returns the outcomes."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    with (
        httpx.Client(base_url=url, timeout=120, limits=limits) as session,
        ThreadPoolExecutor(clients) as pool,
    ):
        return list(pool.map(lambda asked: ask(session, asked), order))


def ask(session: httpx.Client, asked: Asked) -> dict[str, Any]:
    """Sends one request, again after each status 429, and returns its outcome."""
    outcome: dict[str, Any] = {"kind": asked.kind, "status": 0, "again": 0, "seconds": 0.0}
    while True:
        began = time.perf_counter()
        try:
            response = session.request(asked.method, asked.path, **asked.options)
        except httpx.TransportError as error:
            return {**outcome, "wrong": f"no answer: {error!r}"}
        outcome["seconds"] = time.perf_counter() - began
        if response.status_code != 429:
            break
        outcome["again"] += 1
        time.sleep(float(response.headers["retry-after"]))
    try:
        wrong = asked.check(response)
    except (ValueError, LookupError, TypeError) as error:  # not of the shape that is asked for
        wrong = f"{error!r} in {response.text[:200]}"
    return {**outcome, "status": response.status_code, "wrong": wrong}


def memory(url: str) -> dict[str, int]:
    """Returns the memory that the idle server holds, by its own metrics."""
    time.sleep(1)
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return {name: int(found.get(metric, 0)) for name, metric in MEMORY.items()}


def latencies(outcomes: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the number and latency percentiles of requests by kind."""
    by_kind: dict[str, list[float]] = {}
    for each in outcomes:
        by_kind.setdefault(each["kind"], []).append(each["seconds"])
    return {
        kind: {"count": len(times), **percentiles(times)} for kind, times in sorted(by_kind.items())
    }


if __name__ == "__main__":
    sys.exit(main())
