"""Makes the frozen runs: `python tests/frozen/make.py FOLDER`, in a checkout of another revision.

A frozen run is what later code must still read: it is made once, by the code of its time, and never
made again. Beside the runs lies what that code said of them: embeddings, captions, scores, and the
losses of five further steps.
"""

import json
import os
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [os.getcwd(), str(TESTS)]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["UNIFIED_MM_CACHE"] = tempfile.mkdtemp()

import commands  # noqa: E402
import numpy as np  # noqa: E402
import safetensors.numpy  # noqa: E402
import tiny  # noqa: E402

import unified_mm  # noqa: E402
from unified_mm import import_weights  # noqa: E402

STEPS = 40
DATA = "tests/frozen/coco"
TRAINED = {
    "early": (
        "--config.model.width=16",
        "--config.model.feed_forward=32",
        "--config.objectives.matching.weight=1.0",
        "--config.train.average_decay=0.9",
    ),
    "gated": (
        "--config.model.fusion=gated_cross_attention",
        "--config.model.cross.start=0.5",
        "--config.model.resampler.latents=3",
        "--config.model.resampler.layers=1",
        "--config.model.resampler.heads=2",
        "--config.model.resampler.head_width=4",
        "--config.model.resampler.feed_forward=16",
    ),
    "late": ("--config.model.fusion=late", "--config.objectives.captioning.weight=0.0"),
}
COMMON = (
    "--config=configs/coco.py:tiny",
    *commands.SMALL,
    "--config.model.width=8",
    "--config.model.feed_forward=16",
    "--config.model.dropout=0.1",
    "--config.model.modalities.image.patch=8",
    "--config.objectives.contrastive.width=8",
    "--config.logging.every=1",
    "--config.logging.tensorboard=False",
    "--config.train.learning_rate=1e-2",
    f"--config.train.steps={STEPS}",
    f"--config.checkpoint.every={STEPS}",
    "--config.checkpoint.keep=1",
    f"--config.data.dir={DATA}",
)
KEPT = ("config.json", "tokenizer.json", "metrics.jsonl", "result.json", "checkpoints")
TEXTS = ["a red square of size 1", "blue, size 2", "a green square of size 3"]


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copytree(tiny.write_coco(folder / "coco"), DATA)  # as runs are told of it
    for name, flags in TRAINED.items():
        workdir = folder / "made" / name
        train(workdir, flags)
        keep(workdir, folder / name, told(workdir, name != "late") | going_on(workdir, flags))
    write_clip(folder / "made" / "theirs")
    sys.argv = ["import_weights"]
    workdir = folder / "made" / "clip"
    try:
        import_weights.main(["--from", str(folder / "made" / "theirs"), "--out", str(workdir)])
    except SystemExit as ended:
        assert not ended.code
    keep(workdir, folder / "clip", told(workdir, captions=False))
    shutil.rmtree(folder / "made")


def train(workdir: Path, flags: tuple[str, ...]) -> None:
    """Trains a run, or goes on with it as the flags say."""
    assert commands.run(*COMMON, f"--workdir={workdir}", *flags) == 0


def told(workdir: Path, captions: bool) -> dict:
    """What this code says of a run."""
    model = unified_mm.load(workdir)
    images = [f"{DATA}/images/val/{number}.jpg" for number in range(3)]
    told = {
        "step": model.step,
        "images": model.embed_images(images).tolist(),
        "texts": model.embed_texts(TEXTS).tolist(),
        "jax": version("jax"),
    }
    if captions:
        told["captions"] = model.caption(images)
    if (workdir / "result.json").exists():
        told["scores"] = json.loads((workdir / "result.json").read_text())["scores"]
    return told


def going_on(workdir: Path, flags: tuple[str, ...]) -> dict:
    """The losses of five further steps, by step and name."""
    again = workdir.with_name(f"{workdir.name}-again")
    shutil.copytree(workdir, again)
    (again / "result.json").unlink()
    train(again, (*flags, f"--config.train.steps={STEPS + 5}"))
    lines = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    losses = {
        line["step"]: {name: value for name, value in line.items() if name.endswith("loss")}
        for line in lines
        if "loss" in line and line["step"] > STEPS
    }
    assert sorted(losses) == list(range(STEPS + 1, STEPS + 6))
    return {"losses": losses, "flags": [*COMMON, *flags]}


def keep(workdir: Path, folder: Path, expected: dict) -> None:
    """Packs the files of a run that later code reads; beside them, what this code said of it."""
    for path in workdir.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.make_archive(str(folder), "xztar", workdir)
    folder.with_suffix(".json").write_text(json.dumps(expected, indent=1) + "\n")


def write_clip(folder: Path) -> None:
    """A small CLIP in a directory as it is published, of random numbers."""
    width, layers, hidden, grid, patch = 8, 2, 16, 2, 8
    rows = tiny.tokenizer().vocabulary_size
    sizes = {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }
    config = {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": sizes
        | {
            "vocab_size": rows,
            "max_position_embeddings": 12,
            "eos_token_id": tiny.tokenizer().eos_id,
        },
        "vision_config": sizes | {"image_size": grid * patch, "patch_size": patch},
    }
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection.weight": (6, width),
        "visual_projection.weight": (6, width),
        "text_model.embeddings.token_embedding.weight": (rows, width),
        "text_model.embeddings.position_embedding.weight": (12, width),
        "vision_model.embeddings.class_embedding": (width,),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": (grid * grid + 1, width),
    }
    norms = ["text_model.final_layer_norm"]
    norms += ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for tower in ("text_model", "vision_model"):
        for layer in range(layers):
            block = f"{tower}.encoder.layers.{layer}"
            norms += [f"{block}.layer_norm1", f"{block}.layer_norm2"]
            maps = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
            maps |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
            for name, shape in maps.items():
                shapes[f"{block}.{name}.weight"] = shape
                shapes[f"{block}.{name}.bias"] = shape[:1]
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (width,)
    rng = np.random.default_rng(0)
    weights = {name: np.float32(rng.normal(size=shape)) for name, shape in shapes.items()}
    weights["logit_scale"] = np.array(2.0, np.float32)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    tiny.tokenizer().save(folder / "tokenizer.json")
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
