"""Eight devices on any machine, jaxtyping's shapes checked, each program compiled once.

What a run of the tests compiles is kept for the next one and for the processes that tests start:
`pytest --cache-clear` forgets it.
"""

import ctypes
import functools
import gc
import os
import shutil
from importlib.metadata import version
from pathlib import Path

COMPILED = Path(__file__).parents[1] / ".pytest_cache" / "d" / "compiled"
MOST_BYTES = 2**30  # of programs that are kept; beyond, all are forgotten
MOST_HELD = 2**31  # bytes of a worker; beyond, it frees what its last modules compiled

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["UNIFIED_MM_HUGE_PAGES"] = "0"  # commands that tests start do not start again
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # these programs are compiled, hardly run
DEVICES = 8
FLAGS = [
    f"--xla_force_host_platform_device_count={DEVICES}",
    # Eight devices on two busy cores may wait long for each other: no reason to abort.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
]
# With as many threads as devices (XLA's choice), or in the order that the last flag turns off, they
# may wait for ever: `parallel.mesh` says why.
os.environ["PJRT_NPROC"] = str(4 * DEVICES)
if version("jaxlib").startswith("0.10."):  # later ones have no other
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # they take three times as long to compile
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILED)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("unified_mm", "beartype.beartype").__enter__()

import jax  # noqa: E402
import optax  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no type is widened in silence
# The same examples in each run: what failed once fails again, and what was compiled serves again.
settings.register_profile("the same", derandomize=True, deadline=None, database=None)
settings.load_profile("the same")


def _in_their_own_way(function):
    """The function of a library, which widens types as it always did."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


# In bfloat16 the one multiplies by a float32, and the other raises to a count.
for library, name in ((jax.nn, "dot_product_attention"), (optax.tree, "bias_correction")):
    setattr(library, name, _in_their_own_way(getattr(library, name)))

LIBC = ctypes.CDLL(None)
LEFT_OUT = "LEFT OUT"  # what a reason to skip begins with that nobody should overlook


def pytest_configure(config):
    """Forgets the programs that former runs compiled once they are too many."""
    if hasattr(config, "workerinput") or not COMPILED.is_dir():
        return
    if sum(path.stat().st_size for path in COMPILED.iterdir()) > MOST_BYTES:
        shutil.rmtree(COMPILED)


def held():
    """Bytes of memory that this process holds; where nothing tells, more than it should."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return MOST_HELD


def pytest_collection_finish():
    """Keeps Python's collector off what is imported, and rare: to trace makes many small objects.

    With the usual thresholds it took a seventh of the time.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def no_program_is_held():
    """Frees what was compiled where it is much: whoever asks for it again reads it anew."""
    yield
    if held() < MOST_HELD:
        return
    jax.clear_caches()
    gc.collect()
    # What a compiler has freed glibc keeps: without this a worker grows to four gigabytes.
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


@pytest.fixture(autouse=True)
def types_as_jax_lowers_them(request):
    """In how jax itself writes out products of bfloat16 for a TPU, types are widened."""
    lowered = request.node.get_closest_marker("topology") is not None
    with jax.numpy_dtype_promotion("standard" if lowered else "strict"):
        yield


def pytest_terminal_summary(terminalreporter):
    """What was left out for want of a program is said at the end, however quiet pytest is."""
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple) and LEFT_OUT in report.longrepr[2]:
            terminalreporter.write_line(f"WARNING: {report.longrepr[2]}", yellow=True, bold=True)
