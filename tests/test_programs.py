"""Compiled programs are kept in the user's cache, where nobody decided otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src.compilation_cache import compress_executable

from unified_mm.cli import programs
from unified_mm.cli.programs import VARIABLE, keep_programs

COMPILES = """
import sys
import jax, jax.numpy as jnp
from jax._src import monitoring
from unified_mm.cli.programs import keep_programs
found = []
monitoring.register_event_listener(lambda event, **_: found.append(event.rpartition("/")[2]))
keep_programs()
body = lambda carry, x: (jnp.tanh(carry @ x), None)
jax.jit(lambda a, xs: jax.lax.scan(body, a, xs)[0].sum())(jnp.ones((64, 64)), jnp.ones((2, 64, 64)))
print(found.count("cache_hits"), found.count("cache_misses"))
"""


def compiled(folder):
    """Hits and misses of a process of its own, and what it says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    environment = kept | {"JAX_PLATFORMS": "cpu", "UNIFIED_MM_CACHE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    hits, misses = map(int, done.stdout.split())
    return hits, misses, done.stderr


def test_a_second_process_compiles_nothing_and_no_line_speaks_of_errors(tmp_path):
    hits, misses, said = compiled(tmp_path)
    assert hits == 0 < misses and said == ""
    assert compiled(tmp_path) == (misses, 0, "")


def test_what_a_killed_process_left_is_compiled_once_more(tmp_path):
    """It may end within a program, or before anything was written."""
    _, misses, _ = compiled(tmp_path)
    torn, empty, *_, last = sorted((tmp_path / "programs").glob("*-cache"))
    torn.write_bytes(torn.read_bytes()[:-9])
    empty.write_bytes(b"")
    last.with_name("jit_other-1-cache").write_bytes(last.read_bytes())
    assert compiled(tmp_path) == (misses - 2, 2, "")
    assert compiled(tmp_path) == (misses, 0, "")


@pytest.fixture
def settings(monkeypatch):
    """What jax is told, without telling it; nobody has decided."""
    told = {}
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(jax.config, "update", told.__setitem__)
    before = jax.config.jax_compilation_cache_dir
    type(jax.config).update(jax.config, "jax_compilation_cache_dir", None)
    yield told
    type(jax.config).update(jax.config, "jax_compilation_cache_dir", before)


def test_who_decided_is_left_alone(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "")
    keep_programs()
    assert not settings and not list(tmp_path.iterdir())


def test_the_last_used_are_kept(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path))
    folder = tmp_path / "programs"
    folder.mkdir()
    content = compress_executable(b"program")

    def left(*used):
        for when, name in enumerate(used):
            os.utime(folder / f"{name}-cache", (when, 0))
        keep_programs()
        return sorted(file.name[0] for file in folder.iterdir())

    for name in "abcdef":
        (folder / f"{name}-cache").write_bytes(content)
    monkeypatch.setattr(programs, "MOST", 4)
    assert left(*"abcdef") == ["c", "d", "e", "f"]
    assert settings["jax_compilation_cache_dir"] == str(folder)
    monkeypatch.setattr(programs, "MOST_BYTES", 2 * len(content))
    monkeypatch.setattr(Path, "read_bytes", None)  # whole ones are not read again
    assert left(*"defc") == ["c", "f"]


def test_says_why_nothing_is_kept(settings, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("UNIFIED_MM_CACHE", str(tmp_path / "file"))
    keep_programs()
    assert "programs are not kept: " in capsys.readouterr().err
    monkeypatch.delenv("UNIFIED_MM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    keep_programs()
    assert "this user has no home" in capsys.readouterr().err
    assert not settings
