"""Errors pass whole from a worker process to the one that waits for it."""

import importlib
import inspect
import pickle
import re
from pathlib import Path

import unified_mm

PACKAGE = Path(unified_mm.__file__).parent
ERROR = re.compile(r"^class (\w+)\(.*(?:Error|Exception|Warning)\):", re.MULTILINE)


def test_an_error_is_the_same_after_pickling():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in ERROR.findall(path.read_text(encoding="utf-8")):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            kind = getattr(importlib.import_module(".".join(parts)), name)
            if "__init__" not in vars(kind):
                continue
            asked = inspect.signature(kind).parameters.values()
            kinds = {"int": 3, "dict[str, str] | None": {"a": "b"}}
            error = kind(*(kinds.get(each.annotation, each.name) for each in asked))
            again = pickle.loads(pickle.dumps(error))
            assert (str(again), vars(again)) == (str(error), vars(error)), name
            found.append(name)
    assert {"SoundError", "ClipError", "Refusal", "Stopped"} <= set(found)
