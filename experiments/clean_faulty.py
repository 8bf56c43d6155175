"""Does training gain by leaving out what a run finds mismatched?

Question: at equal steps, how much is lost where 10% or 30% of the training pictures have the
captions of another, and how much of that comes back where the share that fits worst, as the run
that was trained on all of them says, is left out?

Expected: at 10% little is lost, for most captions are true in any batch; at 30% retrieval loses,
and cleaned is nearer to clean than to faulty.

The folders are made first, FOLDER being photographs, or the world as rendered in the cache:

    python -m experiments.exchanged_captions plant FOLDER --share=0 --out=runs/cleaning/world/clean
    python -m experiments.exchanged_captions plant FOLDER --share=0.1 \
        --out=runs/cleaning/world/faulty_10
    python -m experiments.sweep experiments/clean_faulty.py:world --only=clean --only=faulty_10
    python -m unified_mm.clean --config=coco:tiny --config.data.dir=runs/cleaning/world/faulty_10 \
        --filter=mismatched,run=runs/ablations/clean_faulty_world/faulty_10-0,threshold=0.1 \
        --out=runs/cleaning/world/cleaned_10
    python -m experiments.sweep experiments/clean_faulty.py:world --only=cleaned_10

and so for 30. On photographs it has not been carried out yet.
"""

from typing import Any

from experiments.sweeping.ablation import Ablation

QUICK: dict[str, Any] = {
    "train.steps": 300,
    "checkpoint.every": 100,
    "checkpoint.keep": 1,
    "evaluation.also": (),
    "evaluation.max_images": 400,
    "logging.tensorboard": False,
}
SIZES = {
    "world": ("configs/coco.py:tiny", QUICK),
    "photographs": (
        "configs/photographs.py:tiny",
        QUICK | {"train.steps": 600, "model.start_from.reader": ""},
    ),
}


def get_ablation(size: str) -> Ablation:
    """Returns the ablation on the world or on photographs."""
    if size not in SIZES:
        raise ValueError(f"no size {size!r}; there are {', '.join(SIZES)}")
    config, common = SIZES[size]
    where = f"runs/cleaning/{size}"
    variants: dict[str, Any] = {"clean": {"data.dir": f"{where}/clean"}}
    for share in (10, 30):
        faulty = {"data.dir": f"{where}/faulty_{share}"}
        manifest = {"data.manifest": f"{where}/cleaned_{share}/manifest.json"}
        variants |= {f"faulty_{share}": faulty, f"cleaned_{share}": faulty | manifest}
    return Ablation(
        config,
        seeds=range(3),
        common=common,
        variants=variants,
        scores=("single_caption/text_to_image/recall_at_1", "caption/nats", "caption/cider_d"),
    )
