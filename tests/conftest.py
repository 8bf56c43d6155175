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
