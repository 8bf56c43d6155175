"""The same short training in each precision, to compare their loss curves.

    for p in float32 bfloat16 float16 bfloat16_moments; do
        python -m unified_mm.main --config=experiments/precision.py:$p --workdir=runs/precision/$p
    done
    python -m experiments.loss_curves precision runs/precision/*

`float32` computes in float32; `bfloat16` and `float16` (with loss scaling) compute in these with
float32 parameters; `bfloat16_moments` computes in float32 and keeps Adam's moments in bfloat16.
"""

from ml_collections import ConfigDict

from experiments import recipe

DTYPES = ("float32", "bfloat16", "float16")


def get_config(precision: str) -> ConfigDict:
    """Returns the config for one of `DTYPES`, or `bfloat16_moments`."""
    config = recipe.get_config("tiny")
    if precision in DTYPES:
        config.model.dtype = precision
    elif precision == "bfloat16_moments":
        config.train.moments_dtype = "bfloat16"
        config.train.moments_rounding = "stochastic"
    else:
        raise ValueError(f"{precision!r}: give {', '.join(DTYPES)} or bfloat16_moments")
    config.train.steps = 300
    config.train.batch_size = 32
    config.train.scale_patience = 50
    config.evaluation.max_images = 200
    config.evaluation.also = ()
    return config
