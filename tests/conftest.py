"""Eight devices on any machine, jaxtyping's shapes checked, no compiled program kept by others."""

import os

# Before jax is imported anywhere.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # these programs are compiled, hardly run
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook("unified_mm", "beartype.beartype").__enter__()

LEFT_OUT = "LEFT OUT"  # what a reason to skip begins with that nobody should overlook


def pytest_terminal_summary(terminalreporter):
    """What was left out for want of a program is said at the end, however quiet pytest is."""
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple) and LEFT_OUT in report.longrepr[2]:
            terminalreporter.write_line(f"WARNING: {report.longrepr[2]}", yellow=True, bold=True)
