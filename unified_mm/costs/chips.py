"""Accelerators that this machine need not have: what they can do, by their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """The peaks of one chip.

    Attributes:
      memory: bytes of its memory.
      flops: dense bfloat16 operations per second of its matrix units.
      memory_bandwidth: bytes per second from and to its memory.
      link_bandwidth: bytes per second that it sends over all its links to other chips together.
    """

    memory: int
    flops: float
    memory_bandwidth: float
    link_bandwidth: float


@dataclass(frozen=True)
class Tpu(Chip):
    """A TPU.

    Attributes:
      dimensions: dimensions of the torus that the chips form.
      largest: number of chips in the largest slice.
    """

    dimensions: int
    largest: int


@dataclass(frozen=True)
class Gpu(Chip):
    """An NVIDIA GPU; its links are those within a host.

    Attributes:
      host: number of GPUs of a host.
      network_bandwidth: bytes per second that it sends to other hosts.
      kind: as the driver calls it.
      capability: its compute capability.
      cores: number of its multiprocessors.
      fpus: float32 units of each.
      shared_memory: bytes of each that its blocks share; a block leaves 1024 to the driver.
      cache: bytes of its second-level cache.
      clock: GHz at most.
    """

    network_bandwidth: float
    kind: str
    capability: tuple[int, int]
    cores: int
    fpus: int
    shared_memory: int
    cache: int
    clock: float
    host: int = 8

    @property
    def description(self) -> str:
        """What XLA's compiler asks a GPU: a text proto `stream_executor.GpuTargetConfigProto`."""
        major, minor = self.capability
        exact = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              shared_memory_per_core: {self.shared_memory}
              core_count: {self.cores} fpus_per_core: {self.fpus}
              memory_bandwidth: {self.memory_bandwidth:.0f} device_memory_size: {self.memory}
              l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
              cuda_compute_capability {{
                major: {major} minor: {minor} feature_extension: {exact}
              }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 8 }}
            device_description_str: "{self.kind}"
        """


# https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p and .../v6e: peak compute, HBM capacity and
# bandwidth, interconnect bandwidth of a chip (bits there). v4's links: Jouppi et al. 2023, table 4.
TPUS = {
    "v4": Tpu(32 * 2**30, 275e12, 1200e9, 300e9, 3, 4096),
    "v5e": Tpu(16 * 2**30, 197e12, 819e9, 200e9, 2, 256),
    "v5p": Tpu(95 * 2**30, 459e12, 2765e9, 600e9, 3, 6144),
    "v6e": Tpu(32 * 2**30, 918e12, 1600e9, 400e9, 2, 256),
}
# Compute and NVLink: NVIDIA's data sheets of the SXM boards (half of what they say with sparsity,
# half of what they say of both directions). Network: DGX, one adapter a GPU (200 Gbit/s in A100's).
# The rest is what such a card says of itself, which XLA publishes (backends/gpu/target_config).
GPUS = {
    "a100": Gpu(
        85_100_068_864, 312e12, 2039e9, 300e9, 25e9,
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 167_936, 41_943_040, 1.41,
    ),
    "h100": Gpu(
        84_942_979_072, 989e12, 3352e9, 450e9, 50e9,
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 233_472, 52_428_800, 1.98,
    ),
    "h200": Gpu(
        151_397_597_184, 989e12, 4800e9, 450e9, 50e9,
        "NVIDIA H200", (9, 0), 132, 128, 233_472, 52_428_800, 1.98,
    ),
    "b200": Gpu(
        191_514_411_008, 2250e12, 7672e9, 900e9, 50e9,
        "NVIDIA B200", (10, 0), 148, 128, 233_472, 132_644_864, 1.965,
    ),
}  # fmt: skip
CHIPS: dict[str, Chip] = {**TPUS, **GPUS}
