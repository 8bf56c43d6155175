"""Every field that a config has, with its default. Recipes in `configs/` start from it.

Runs that were made before there was a field are read with its default (`runs.saved`): the default
of a new field is what the code did without it.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def default_config() -> ConfigDict:
    """Returns the whole config: a small early-fusion model on images and their captions.

    Lengths are tokens, sizes pixels, rates a step; a share or a rate is in [0, 1].
    """
    return ConfigDict(
        {
            "seed": 0,
            "size": "",  # which preset of the recipe this is; only said, never read
            "data": data_fields(),
            "model": model_fields(),
            "objectives": objective_fields(),
            "train": training_fields(),
            "mesh": mesh_fields(),
            "checkpoint": {
                "every": 100,  # steps
                "keep": 2,  # newest checkpoints that stay
                "asynchronous": True,
            },
            "evaluation": evaluation_fields(),
            "logging": {
                "every": 10,  # steps
                "tensorboard": True,
            },
        }
    )


def defaults() -> dict[str, Any]:
    """Returns all defaults as plain values, to read saved runs with; `*` is any phase's."""
    found: dict[str, Any] = default_config().to_dict()
    found["train"]["phases"]["*"] = phase(0)
    return found


def mesh_fields() -> dict:
    """Returns the devices along each axis of the mesh; -1 takes what is left.

    What each axis divides is in `parallel.sharding`.
    """
    return {
        "data": -1,  # the batch
        "fsdp": 1,  # the batch, and what `zero` says
        "tensor": 1,  # heads, feed-forward, vocabulary
        "sequence": 1,  # tokens outside attention, heads within it
        "stage": 1,  # layers: a pipeline
        "stage_micro_batches": 0,  # that pass through it at a time; 0: four times the stages
        "expert": 1,  # reserved
        # What fsdp divides: 1 optimizer state, 2 gradients too, 3 parameters too (ZeRO).
        "zero": 3,
    }


def data_fields() -> dict:
    """Returns the fields of the data that is trained and scored on."""
    return {
        # 'auto': `dir` if given, else a documented place, else the embedded world; or 'coco',
        # 'world', 'tfds', or 'package.module:function' of your own.
        "source": "auto",
        "dir": "",
        # What the features of a TFDS dataset are called; '' takes the usual names, which
        # `data.tfds_features` lists. `captions` may name a text in a group, as captions.text.
        "tfds": {"image": "", "captions": "", "id": "", "name": "", "mirrorable": ""},
        "cache_dir": "",  # where the world and checked manifests are kept; '' is the user's cache
        "train_split": "train",
        "image_size": 64,
        "crop_scale": (0.5, 1.0),  # share of a picture's area that a training crop keeps
        "crop_ratio": (0.75, 1.3333),  # width / height of a training crop
        "mirror": True,  # flip training pictures, where no caption names a side
        "decoder": "pillow",  # or 'opencv'
        "resampling": "bicubic",  # or 'bilinear'
        "fit": "crop",  # the central square; or 'crop_resized', 'squash': see `data.images`
        "max_bad_share": 0.05,  # of images that cannot be read, before the run is refused
        "question_share": 0.0,  # how often a question with its answer is drawn, not a caption
        "tokenizer": "",  # a tokenizer.json; '' trains one on the training captions
        "vocabulary_size": 8192,  # of the one that is trained
        # How the tokenizer calls them; bos '' puts nothing before a text. A text that is too long
        # loses its eos, unless eos_when_cut.
        "special_tokens": {"pad": "<pad>", "bos": "<bos>", "eos": "<eos>", "eos_when_cut": False},
        # Interleaved documents, for the phases of training that ask for them.
        "documents": {
            "file": "",  # JSON lines; '' makes few-shot documents of the pairs
            "shots": 4,  # examples before an example of its own, where they are made
            "questions": False,  # made of questions and answers, not of captions
            "images": 5,  # slots a row
            "length": 160,  # text tokens a row
        },
        "threads": 2,  # that read ahead
        "workers": 0,  # processes that read ahead, beside the threads
        "world": {"train": 20000, "val": 1000, "test_composition": 1000, "seed": 0},
    }


def model_fields() -> dict:
    """Returns the fields of the transformers and what they read; `nn.options` explains them."""
    return {
        "fusion": "early",  # or 'gated_cross_attention', 'late'
        "width": 128,
        "layers": 4,
        "heads": 4,
        "key_value_heads": 0,  # 0: as many as heads
        "head_width": 0,  # 0: width / heads
        "feed_forward": 512,
        # What a layer is, and what stands in it after attention: by name, or 'package.module:CLASS'
        # of your own with options of its own.
        "block": "transformer",
        "block_options": {},
        "feed_forward_type": "dense",
        "feed_forward_options": {},
        "dropout": 0.0,
        "norm": "layer",  # or 'rms'
        "norm_epsilon": 1e-6,
        "norm_place": "pre",  # or 'post'
        "final_norm": True,
        "activation": "gelu",
        "gated_feed_forward": False,
        "query_bias": True,
        "output_bias": True,
        "feed_forward_bias": True,
        "rotary_base": 0.0,  # 0: no rotary positions
        "separate_attention": False,  # projections of its own for each modality
        "separate_feed_forward": False,
        "remat": "none",  # or 'full', 'dots', 'offload': what the backward pass recomputes
        # 'auto' by device, shape and rule; or 'xla', 'chunked', 'cudnn', 'splash': see
        # `nn.attention.backends`.
        "attention": "auto",
        "unroll": 1,  # periods a step of the scan over layers
        "dtype": "float32",  # of the computation, or 'bfloat16', 'float16'; parameters stay float32
        # Runs whose image tower or text model training starts from; '' starts afresh. A recipe may
        # name further modalities here, for their towers.
        "start_from": {"image": "", "text": ""},
        # Width or depth matched to so many FLOPs a training example (0: as they stand).
        "budget": 0.0,
        "budget_by": "width",  # or 'layers'
        "tower": tower_fields(),
        "towers": {},  # by modality, what its tower has other than `tower`
        "cross": cross_fields(),
        "resampler": resampler_fields(),
        "modalities": modality_fields(),
    }


def tower_fields() -> dict:
    """Returns the fields of the context's own transformer in late and gated fusion.

    What is 0 or None is as in `model`.
    """
    return {
        "width": 0,
        "layers": 0,
        "heads": 0,
        "feed_forward": 0,
        "key_value_heads": placeholder(int),
        "head_width": placeholder(int),
        "norm": placeholder(str),
        "norm_epsilon": placeholder(float),
        "norm_place": placeholder(str),
        "block": placeholder(str),
        "block_options": placeholder(dict),
        "feed_forward_type": placeholder(str),
        "feed_forward_options": placeholder(dict),
        "final_norm": placeholder(bool),
        "activation": placeholder(str),
        "gated_feed_forward": placeholder(bool),
        "query_bias": placeholder(bool),
        "output_bias": placeholder(bool),
        "feed_forward_bias": placeholder(bool),
        "rotary_base": placeholder(float),
        "attention": placeholder(str),
    }


def cross_fields() -> dict:
    """Returns the fields of the cross-attention layers in gated fusion."""
    return {
        "every": 1,  # one before each n-th block
        "gate": "tanh",  # or 'sigmoid'
        "shape": "scalar",  # or 'channel'
        "start": 0.0,  # alpha; the layer passes gate(alpha)
        "query_key_norm": False,
    }


def resampler_fields() -> dict:
    """Returns the fields of the resampler in gated fusion.

    It stands between the tower and the cross-attention layers.
    """
    return {
        "latents": 64,  # 0: no resampler, every feature is looked at
        "layers": 2,
        "heads": 4,
        "head_width": 32,
        "feed_forward": 512,
        "activation": "gelu_exact",
        "frames": 8,  # that a clip may have, each with a learned embedding; 0 has none
        "query_key_norm": False,
        "head_norm": "rms",  # the kind of that norm; or 'layer'
    }


def modality_fields() -> dict:
    """Returns the fields of each modality, by name."""
    return {
        "image": {
            "type": "image",
            "patch": 8,
            "stem": "linear",  # or 'hierarchical'
            # Positions of patches start as sines of row and column ('grid') or of the place in
            # reading order ('line'), or 'random'; or there are 'none'.
            "positions": "grid",
            "bias": True,
            "class_token": False,
            "modality_embedding": True,
            "norm": False,
            "norm_epsilon": 1e-6,
            "mean": (0.5, 0.5, 0.5),  # of pixels in 0..1
            "std": (0.5, 0.5, 0.5),
        },
        "text": {
            "type": "text",
            "length": 32,
            "max_positions": 0,  # positions that are learned; 0: as many as length
            "learned_positions": True,
            "modality_embedding": True,
            "scaled": True,
            "norm": False,
            "norm_epsilon": 1e-6,
            "head": "tied",  # or 'own'
            "vocabulary": 0,  # tokens that have embeddings; 0: those of the tokenizer
            "attend_padding": False,  # padding is seen as text is
        },
    }


def objective_fields() -> dict:
    """Returns the fields of each objective, by name; weight 0 switches one off.

    `rule` is the attention rule that the text is read by. `weight_schedule` says how the weight
    changes over a run: '' not at all, 'rising', 'falling', 'rising_by_half', 'falling_from_half',
    or `package.module:FUNCTION` of (step, steps) -> factor.
    """
    return {
        "contrastive": {
            "type": "contrastive",
            "weight": 1.0,
            "weight_schedule": "",
            "rule": "separate",
            "loss": "softmax",  # or 'sigmoid'
            # Modalities that are held against each other: 'image' is against text, 'text' against
            # itself, 'image,audio' against one another, and so on, each two with a loss.
            "between": "image",
            "width": 128,
            "pool": "mean",  # of the context's tokens: or 'first', 'last', 'attention'
            "text_pool": "mean",
            "pool_heads": 4,  # of 'attention'
            "pool_feed_forward": 0,  # after it; 0: four times the width
            "projection": "linear",  # or 'affine', or 'none'
            "text_projection": "linear",
            "bound_scale": True,  # the logits' scale to at most 100
            "chunk": 1024,  # texts that are compared at a time, at most; 0: all at once
        },
        "captioning": {
            "type": "captioning",
            "weight": 1.0,
            "weight_schedule": "",
            "rule": "prefix",
            "chunk": 0,  # tokens of each text that are scored at a time; 0: all at once
        },
        "matching": {
            "type": "matching",
            "weight": 0.0,
            "weight_schedule": "",
            "rule": "prefix",
            "mine_from": "contrastive",
        },
    }


def training_fields() -> dict:
    """Returns the fields of training; rules are (pattern of a parameter's path, value)."""
    return {
        "steps": 1000,
        "batch_size": 128,
        "micro_batches": 1,  # the batch is worked off in so many parts
        "optimizer": "adamw",  # or 'muon', 'schedule_free' (which wants schedule 'constant')
        "learning_rate": 1e-3,
        "schedule": "cosine",  # after the warm-up; or 'linear', 'constant', 'constant_then_linear'
        "warmup_steps": 50,
        "final_rate": 0.02,  # of the learning rate, at the last step
        "b1": 0.9,
        "b2": 0.98,
        "epsilon": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "moments_dtype": "float32",  # that Adam's moments are kept as; or 'bfloat16'
        "scale_patience": 500,  # float16: finite steps after which the loss's scale doubles
        "ema_decay": 0.0,  # of the moving average of parameters; 0 keeps none
        "learning_rate_rules": ((".*", 1.0),),  # factors of the learning rate
        "weight_decay_rules": ((".*/kernel", 1.0), (".*", 0.0)),  # factors of the decay
        "freeze_rules": ((".*", False),),
        # What changes gradients beside the optimizer: 'package.module:CLASS' of your own
        # (`training.treatment`), or '' for nothing.
        "treatment": "",
        # One group a phase, gone through in the order of their names: see `phase`. Without any
        # there is one phase of `steps`.
        "phases": {},
    }


def phase(steps: int, **changes: Any) -> dict:
    """Returns the fields of a phase of training, as it stands under its name in `train.phases`.

    Args:
      steps: steps that it takes; 0 leaves it out.
      changes: `data`: 'pairs', 'text' (pairs whose images are withheld) or 'documents';
        `objectives`: weights by name, in place of those that all objectives have of their own;
        `train`: other values of fields of `train`, for this phase.
    """
    return {"steps": steps, "data": "pairs", "objectives": {}, "train": {}, **changes}


def evaluation_fields() -> dict:
    """Returns the fields of what is scored at the end, and along the way."""
    return {
        "split": "val",
        "also": ("test_composition",),  # further splits, scored at the end where the data has them
        "every": 0,  # steps between evaluations on the way; 0 scores at the end alone
        "batch_size": 100,
        "max_images": 5000,  # of a split, the first ones
        "questions": False,  # score answers also where no question is trained on
        "shots": (),  # examples in context, e.g. (0, 4, 8), for few-shot scores
        "few_shot_images": 200,  # that these are taken on, the first ones
        "few_shot_questions": 200,
        # The score that `best/` is chosen by, the lowest where less of it is better; '' is
        # text-to-image recall at 1 (of one caption an image) where contrast is learned, else
        # CIDEr-D.
        "best_by": "",
    }
