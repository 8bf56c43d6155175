"""Every field that a config has, with its default. Recipes in `configs/` start from it.

Runs that were made before there was a field are read with its default (`runs.saved`): the default
of a new field is what the code did without it.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from unified_mm.config import defaults_of, option
from unified_mm.modalities.audio import AudioModality
from unified_mm.modalities.image import ImageEmbedding
from unified_mm.modalities.points import PointsModality
from unified_mm.modalities.text import TextEmbedding, TextModality
from unified_mm.modalities.video import VideoModality
from unified_mm.models.features import ProjectorOptions
from unified_mm.nn.options import (
    FEED_FORWARDS,
    OWN_OPTIONS,
    DroppingOptions,
    GateOptions,
    TransformerOptions,
)
from unified_mm.objectives.objective import BUILT_IN
from unified_mm.registry import resolve

STACK_FIELDS = TransformerOptions.config_fields()
# Of these a context's tower has no values of its own.
MAIN_ALONE = (
    "dropout",
    "separate_attention",
    "separate_feed_forward",
    "remat",
    "unroll",
    "dtype",
    "places",
    "exits",
)


@dataclass(frozen=True)
class MeshOptions:
    """The devices along each axis of the mesh; -1 takes what is left.

    What each axis divides is in `parallel.sharding`.
    """

    data: int = -1  # the batch
    fsdp: int = 1  # the batch, and what `zero` says
    tensor: int = 1  # heads, feed-forward, vocabulary
    sequence: int = 1  # tokens outside attention, heads within it
    stage: int = 1  # layers: a pipeline
    # Micro-batches that pass through it at a time; 0: four times the stages.
    stage_micro_batches: int = option(0, least=0)
    expert: int = 1  # the batch, and experts within their layers
    # What fsdp divides: 1 optimizer state, 2 gradients too, 3 parameters too (ZeRO).
    zero: int = option(3, choices=(1, 2, 3))


@dataclass(frozen=True)
class TrainOptions:
    """The options of training; rules are (pattern of a parameter's path, value)."""

    steps: int = option(1000, least=1)
    # Passes over the examples in place of steps, which are computed from them; 0: steps are meant.
    epochs: float = option(0.0, least=0, below=math.inf)
    batch_size: int = option(128, least=1)
    micro_batches: int = option(1, least=1)  # the batch is worked off in so many parts
    optimizer: str = "adamw"  # or 'muon', 'schedule_free' (which wants schedule 'constant')
    learning_rate: float = option(1e-3, above=0, below=math.inf)
    schedule: str = "cosine"  # after the warm-up; or 'linear', 'constant', 'constant_then_linear'
    warmup_steps: int = option(50, least=0)
    final_rate: float = option(0.02, least=0, most=1)  # of the learning rate, at the last step
    b1: float = option(0.9, least=0, below=1)
    b2: float = option(0.98, least=0, below=1)
    epsilon: float = option(1e-8, above=0, below=math.inf)
    weight_decay: float = option(0.05, least=0, below=math.inf)
    clip_norm: float = option(1.0, above=0)
    # Of the gradient of a stem, the most that it may be of a unit's weights (Brock et al. 2021); 0
    # does not ask.
    adaptive_clip: float = option(0.0, least=0, below=math.inf)
    # That Adam's moments are kept as.
    moments_dtype: str = option("float32", choices=("float32", "bfloat16"))
    # How bfloat16 is rounded to. 'nearest' freezes a moment at its maximum where b1 or b2 is above
    # 0.996: what a step takes off is less than half of the last bit.
    moments_rounding: str = option("nearest", choices=("nearest", "stochastic"))
    # With float16: finite steps after which the loss's scale doubles.
    scale_patience: int = option(500, least=1)
    # Of the moving average of parameters; 0 keeps none.
    ema_decay: float = option(0.0, least=0, below=1)
    # Whether that decay rises with the steps, as min(ema_decay, (1 + step) / (10 + step)), so that
    # a short run's average does not hold its random start.
    ema_warmup: bool = False
    learning_rate_rules: tuple = ((".*", 1.0),)  # factors of the learning rate
    weight_decay_rules: tuple = ((".*/kernel", 1.0), (".*", 0.0))  # factors of the decay
    freeze_rules: tuple = ((".*", False),)
    # What changes gradients beside the optimizer: 'package.module:CLASS' of your own
    # (`training.treatment`), or '' for nothing.
    treatment: str = ""


@dataclass(frozen=True)
class PhaseOptions:
    """The options of a phase of training.

    Attributes:
      objectives: weights by name, in place of those that all objectives have of their own.
      train: other values of fields of `train`, for this phase.
      steps: that it takes; 0 leaves it out.
      data: 'text' is pairs whose images are withheld.
    """

    objectives: Any
    train: Any
    steps: int = option(0, least=0)
    data: str = option("pairs", choices=("pairs", "text", "documents"))


@dataclass(frozen=True)
class CheckpointOptions:
    """The steps at which checkpoints are saved, and how."""

    every: int = option(100, least=1)  # steps
    keep: int = option(2, least=1)  # newest checkpoints that stay
    asynchronous: bool = True


@dataclass(frozen=True)
class LoggingOptions:
    """The steps at which metrics are written, and where."""

    every: int = option(10, least=1)  # steps
    tensorboard: bool = True
    peak_flops: float = option(0.0, least=0)  # FLOP/s of a device, for MFU; 0: the kind's, if known


@dataclass(frozen=True)
class ReadingOptions:
    """The workers that read data ahead."""

    threads: int = option(2, least=1)
    workers: int = option(0, least=0)  # processes, beside the threads


@dataclass(frozen=True)
class ScoringOptions:
    """The options of scores at the end, and along the way, that every run reads."""

    split: str = "val"
    every: int = option(0, least=0)  # steps between them on the way; 0 scores at the end alone
    batch_size: int = option(100, least=1)
    max_images: int = option(5000, least=2)  # of a split, the first ones
    # The score that `best/` is chosen by; '' is text-to-image recall at 1 (of one caption an
    # image) where contrast is learned, else CIDEr-D.
    best_by: str = ""


@dataclass(frozen=True)
class EvaluationOptions(ScoringOptions):
    """All options of scores."""

    # Further splits, scored at the end where the data has them.
    also: tuple = ("test_composition",)
    # What normalises captions that are scored as transcripts, too: 'plain' (lower case, no
    # punctuation) or 'exact'; '' scores none.
    transcripts: str = option("", choices=("", "plain", "exact"))
    negatives: int = option(0, least=0)  # sounds of silence and noise, of which nothing be written
    negatives_of: str = ""  # and of stretches of the files of this pattern, such as 'rain/*.wav'
    questions: bool = False  # score answers also where no question is trained on
    shots: tuple = ()  # examples in context, e.g. (0, 4, 8), for few-shot scores
    few_shot_images: int = 200  # that these are taken on, the first ones
    few_shot_questions: int = 200


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
            # `phases`: one group a phase, gone through in the order of their names: see `phase`.
            # Without any there is one phase of `steps`.
            "train": {**defaults_of(TrainOptions), "phases": {}},
            "mesh": defaults_of(MeshOptions),
            "checkpoint": defaults_of(CheckpointOptions),
            "evaluation": defaults_of(EvaluationOptions),
            "logging": defaults_of(LoggingOptions),
        }
    )


def defaults() -> dict[str, Any]:
    """Returns all defaults as plain values, to read saved runs with; `*` is any phase's.

    What recipes alone declare is among them, such as audio, points and video, and of each kind of
    feed-forward its own options.
    """
    found: dict[str, Any] = default_config().to_dict()
    found["train"]["phases"]["*"] = phase(0)
    declared = {"audio": AudioModality, "points": PointsModality, "video": VideoModality}
    for name, kind in declared.items():
        found["model"]["modalities"][name] = {"type": name, **defaults_of(kind)}
    kinds = {name: resolve("feed-forward", name, FEED_FORWARDS) for name in FEED_FORWARDS}
    found["model"]["feed_forward_options"] = {name: own_options(kinds[name]) for name in kinds}
    return found


def own_options(kind: Any) -> dict[str, Any]:
    """Returns the defaults of the options that a kind of module has of its own."""
    return {name: x for name, x in defaults_of(kind).items() if name not in ("parent", "name")}


def data_fields() -> dict:
    """Returns the fields of the data that is trained and scored on."""
    return {
        # 'auto': `dir` if given, else a documented place, else the embedded world; or 'coco',
        # 'world', 'tfds', or 'package.module:function' of your own.
        "source": "auto",
        "dir": "",
        # Several sources, by name, where source is 'mixture': see `data.mixture`. Without shares of
        # their own they have those of their sizes to this power.
        "mixture": {},
        "mixture_alpha": 1.0,
        # What the features of a TFDS dataset are called; '' takes the usual names, which
        # `data.tfds_features` lists. `captions` may name a text in a group, as captions.text.
        "tfds": {"image": "", "captions": "", "id": "", "name": "", "mirrorable": ""},
        "manifest": "",  # what `python -m unified_mm.clean` wrote of what to leave out
        # What lists, tables and parquet files call images, captions, sounds, shapes, classes and
        # videos; '' takes the usual names. Several of sounds, as 'speech,sound', are modalities so
        # named.
        "fields": {
            "image": "",
            "caption": "",
            "audio": "",
            "points": "",
            "label": "",
            "video": "",
        },
        "val_rows": "",  # of lists, as 'fold=4' or 'take=5,6': 'val', and all others 'train'
        "val_share": 0.1,  # of a folder without a split to score on, by the examples' names
        "cache_dir": "",  # where what is made of data is kept; '' is the user's cache
        "train_split": "train",
        "image_size": 64,
        "crop_scale": (0.5, 1.0),  # share of a picture's area that a training crop keeps
        "crop_ratio": (0.75, 1.3333),  # width / height of a training crop
        # Training views that there are of a picture, drawn by view_seed; 0: ever new ones. With
        # keep_features, what a frozen tower or stem makes of them is computed once, and kept; so is
        # what a frozen reader, or late fusion's frozen transformer, makes of the texts.
        "views": 0,
        "view_seed": 0,
        "keep_features": False,
        # Decode large enough that no crop is enlarged, also where it is wide or tall.
        "sharp_crops": False,
        "mirror": True,  # flip training pictures, where no caption names a side
        "decoder": "pillow",  # or 'opencv'
        "resampling": "bicubic",  # or 'bilinear'
        "fit": "crop",  # the central square; or 'crop_resized', 'squash': see `data.images`
        # Training images that are decoded before the first step, always the same; 0: all. A bad one
        # of the others counts as absent when it is met, is named, and falls under max_bad_share.
        "check_at_most": 0,
        "max_bad_share": 0.05,  # of images that cannot be read, before the run is refused
        # Share of training examples that are made of silence and noise, with an empty text.
        "negatives": 0.0,
        "negatives_of": "",  # and of stretches of the files of this pattern, such as 'rain/*.wav'
        "question_share": 0.0,  # how often a question with its answer is drawn, not a caption
        "tokenizer": "",  # a tokenizer.json; '' trains one on the training captions
        "vocabulary_size": 8192,  # of the one that is trained
        # How the tokenizer calls them; bos '' puts nothing before a text. A text that is too long
        # loses its eos, unless eos_when_cut. With space_before_target, an answer has the tokens it
        # has after its question in a text (GPT-2's words begin with their space). `image` stands
        # for the picture within a prompt (LLaVA), '' for none.
        "special_tokens": {
            "pad": "<pad>",
            "bos": "<bos>",
            "eos": "<eos>",
            "eos_when_cut": False,
            "space_before_target": False,
            "image": "",
        },
        # Interleaved documents, for the phases of training that ask for them.
        "documents": {
            "file": "",  # JSON lines; '' makes few-shot documents of the pairs
            "shots": 4,  # examples before an example of its own, where they are made
            "questions": False,  # made of questions and answers, not of captions
            "images": 5,  # slots a row, for images and as many for each other modality
            "length": 160,  # text tokens a row
        },
        **defaults_of(ReadingOptions),
        "world": {"train": 20000, "val": 1000, "test_composition": 1000, "seed": 0},
    }


def model_fields() -> dict:
    """Returns the fields of the transformers and what they read.

    `nn.options.TransformerOptions` explains those that are not below.
    """
    stack = defaults_of(TransformerOptions)
    return {
        "fusion": "early",  # or 'early_features', 'gated_cross_attention', 'late'
        "width": 128,
        "layers": 4,
        "heads": 4,
        "feed_forward": 512,
        **{name: value for name, value in stack.items() if name in STACK_FIELDS},
        "block_options": {},
        # Rotary scaling to longer texts: {"type": "linear", "factor": 2.0}, or 'llama3' with more.
        "rotary_options": {},
        "feed_forward_options": {},
        # By modality, what its tokens see of each other, such as {"image": {"grid": 2}} or
        # {"text": {"window": 256, "first": 4}}; `nn.options.SparseOptions` explains them.
        "sparse": {},
        # Of the computation, or 'bfloat16', 'float16'; 'auto', as our recipes have it, is bfloat16
        # on accelerators and float32 on CPUs. Parameters stay float32.
        "dtype": "float32",
        # Runs whose image tower, text model or stem of images training starts from, by whose text
        # model contrast reads (`reader`), or that it goes on with as a whole, heads and all; ''
        # starts afresh. package:NAME/FOLDER is weights in an installed package, with a ? at its
        # end where it is installed and else ''. A recipe may name further modalities here, for
        # their towers. What need not be trained, such as a reader, train.freeze_rules hold.
        "start_from": {"image": "", "reader": "", "stem": "", "text": "", "whole": ""},
        # The text model by which contrast reads its texts, as the run of start_from.reader has it.
        "reader": {},
        # Width or depth matched to so many FLOPs a training example (0: as they stand).
        "budget": 0.0,
        "budget_by": "width",  # or 'layers'
        "tower": tower_fields(),
        "towers": {},  # by modality, what its tower has other than `tower`
        "cross": {**defaults_of(GateOptions), "every": 1},  # in gated fusion
        "dropping": defaults_of(DroppingOptions),  # in early fusion
        "resampler": resampler_fields(),
        "projector": defaults_of(ProjectorOptions),  # in early fusion of features
        "modalities": modality_fields(),
    }


def tower_fields() -> dict:
    """Returns the fields of the context's own transformer, where a fusion has towers.

    What is 0 or None is as in `model`.
    """
    kinds = typing.get_type_hints(TransformerOptions) | dict.fromkeys(OWN_OPTIONS, dict)
    own = {name: placeholder(kinds[name]) for name in STACK_FIELDS if name not in MAIN_ALONE}
    return own | dict.fromkeys(("width", "layers", "heads", "feed_forward"), 0)


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
        "image": {"type": "image", **defaults_of(ImageEmbedding), "stem_options": {}},
        "text": {
            "type": "text",
            "max_positions": 0,  # positions that are learned; 0: as many as length
            "vocabulary": 0,  # tokens that have embeddings; 0: those of the tokenizer
            **defaults_of(TextModality),
            **defaults_of(TextEmbedding),
        },
    }


def objective_fields() -> dict:
    """Returns the fields of each objective, by name; weight 0 switches one off.

    `rule` is the attention rule that the text is read by. `weight_schedule` says how the weight
    changes over a run: '' not at all, 'rising', 'falling', 'rising_by_half', 'falling_from_half',
    or `package.module:FUNCTION` of (step, steps) -> factor.
    """
    kinds = {name: resolve("objective", name, BUILT_IN) for name in BUILT_IN}
    return {
        name: {"type": name, "weight_schedule": "", **defaults_of(kind)}
        for name, kind in kinds.items()
    }


def phase(steps: int, **changes: Any) -> dict:
    """Returns the fields of a phase of training, as it stands under its name in `train.phases`.

    Args:
      steps: steps that it takes; 0 leaves it out.
      changes: other values than the defaults of `PhaseOptions`.
    """
    return {**defaults_of(PhaseOptions), "objectives": {}, "train": {}, "steps": steps, **changes}
