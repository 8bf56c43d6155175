"""Every field that a config has, with its default. Recipes in `configs/` start from it."""

from __future__ import annotations

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
    """The whole config: a small early-fusion model on images and their captions.

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
            # Devices along each axis; -1 takes what is left.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
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


def data_fields() -> dict:
    """What is trained and scored on."""
    return {
        # 'auto': `dir` if given, else a documented place, else the embedded world; or 'coco',
        # 'world', or 'package.module:function' of your own.
        "source": "auto",
        "dir": "",
        "cache_dir": "",  # where the world and checked manifests are kept; '' is the user's cache
        "train_split": "train",
        "image_size": 64,
        "crop_scale": (0.5, 1.0),  # share of a picture's area that a training crop keeps
        "crop_ratio": (0.75, 1.3333),  # width / height of a training crop
        "mirror": True,  # flip training pictures, where no caption names a side
        "decoder": "pillow",  # or 'opencv'
        "max_bad_share": 0.05,  # of images that cannot be read, before the run is refused
        "question_share": 0.0,  # how often a question with its answer is drawn, not a caption
        "tokenizer": "",  # a tokenizer.json; '' trains one on the training captions
        "vocabulary_size": 8192,  # of the one that is trained
        "threads": 2,  # that read ahead
        "workers": 0,  # processes that read ahead, beside the threads
        "world": {"train": 20000, "val": 1000, "test_composition": 1000, "seed": 0},
    }


def model_fields() -> dict:
    """The transformer and what it reads."""
    return {
        "fusion": "early",
        "width": 128,
        "layers": 4,
        "heads": 4,
        "feed_forward": 512,
        "dropout": 0.0,
        "separate_attention": False,  # projections of its own for each modality
        "separate_feed_forward": False,
        "rematerialise": False,  # recompute activations in the backward pass
        "unroll": 1,  # layers a step of the scan over layers
        "dtype": "float32",  # of the computation; parameters stay float32
        "modalities": {
            "image": {"type": "image", "patch": 8, "stem": "linear"},  # or 'hierarchical'
            "text": {"type": "text", "length": 32},
        },
    }


def objective_fields() -> dict:
    """What is scored, and by which attention rule the text is read; weight 0 switches off."""
    return {
        "contrastive": {
            "type": "contrastive",
            "weight": 1.0,
            "rule": "separate",
            "loss": "softmax",  # or 'sigmoid'
            "between": "image",
            "width": 128,
        },
        "captioning": {"type": "captioning", "weight": 1.0, "rule": "prefix"},
        "matching": {
            "type": "matching",
            "weight": 0.0,
            "rule": "prefix",
            "mine_from": "contrastive",
        },
    }


def training_fields() -> dict:
    """The optimizer and its schedule. Rules are (pattern of a parameter's path, value)."""
    return {
        "steps": 1000,
        "batch_size": 128,
        "micro_batches": 1,  # the batch is worked off in so many parts
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "final_rate": 0.02,  # of the learning rate, at the last step
        "b1": 0.9,
        "b2": 0.98,
        "epsilon": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 1.0,
        "average_decay": 0.0,  # of the moving average of parameters; 0 keeps none
        "learning_rate_rules": ((".*", 1.0),),  # factors of the learning rate
        "weight_decay_rules": ((".*/kernel", 1.0), (".*", 0.0)),  # factors of the decay
        "freeze_rules": ((".*", False),),
    }


def evaluation_fields() -> dict:
    """What is scored at the end, and along the way."""
    return {
        "split": "val",
        "also": ("test_composition",),  # further splits, scored at the end where the data has them
        "every": 0,  # steps between evaluations on the way; 0 scores at the end alone
        "batch_size": 100,
        "max_images": 5000,  # of a split, the first ones
        "best_by": "single_caption/text_to_image/recall_at_1",
    }
