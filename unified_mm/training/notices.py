"""What a person should know of a run before its first step, though nothing of it is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np

from unified_mm.config import Config
from unified_mm.data.records import Manifest
from unified_mm.objectives.captioning import Captioning
from unified_mm.objectives.transcription import Transcription
from unified_mm.task import Task
from unified_mm.training.phases import phase_options

LOOKED_AT = 5000  # texts of which the lengths are taken: a quarter of a second before a run
MEASURED = 1000  # sounds likewise
MAY_BE_CUT = 0.01  # share of texts for which a sufficient length is named
MAY_BE_START = 0.01  # share of the random start that an average may hold unsaid
# The decay above which a step takes less off a moment than half of bfloat16's last bit, which is at
# most 1/128 of a number.
FREEZES = 1 - 1 / 256


def notices(config: Config, task: Task, train: Manifest) -> list[str]:
    """Returns a line for each thing to know about the training data and what becomes of it."""
    return [
        line
        for line in (
            epochs_line(len(train.records), config),
            cut_line(task, train),
            mirror_line(config, task),
            *crop_lines(task, train),
            *short_lines(task, train),
            foils_line(task, train),
            moments_line(config.train),
            average_line(config.train),
        )
        if line
    ]


def epochs_line(examples: int, config: Config) -> str:
    """Says how many epochs the steps are, and where a batch holds examples more than once."""
    steps: dict[int, int] = {}  # by the size of their batch
    for options in phase_options(config).values():
        size = config.train.changed(options.train).batch_size
        steps[size] = steps.get(size, 0) + options.steps
    told = " and ".join(f"{count:,} steps of {size:,}" for size, count in steps.items())
    epochs = sum(size * count for size, count in steps.items()) / examples
    line = f"{told} examples are {epochs:.3g} epochs of {examples:,}"
    if (largest := max(steps)) > examples:
        line += (
            f"; a batch holds every example {largest / examples:.3g} times: contrast takes a "
            "copy for a wrong answer unless its same_item_negatives is False"
        )
    return line


def cut_share(task: Task, train: Manifest, of_reader: bool = False) -> tuple[float, int]:
    """Returns the share of training texts that are cut, and the length that would cut 1%.

    Of more than 5,000 texts, as many are looked at, evenly spread.

    Args:
      task: of the run.
      train: the examples.
      of_reader: whether they are cut for the reader, and not for the model.
    """
    text = task.modalities.get("text")
    text = text.reader if text and of_reader else text
    texts = [each for record in train.records for each in record.texts]
    if text is None or not texts:
        return 0.0, 0
    chosen = [
        texts[i] for i in np.linspace(0, len(texts) - 1, min(len(texts), LOOKED_AT), dtype=int)
    ]
    encode, ids = text.tokenizer.encode_prompt, text.tokenizer.target_ids
    lengths = np.array(
        [len(encode(each.prompt)) + len(ids(each.prompt, each.target)) + 1 for each in chosen]
    )
    # The smallest length that as few are above: quantiles of whole tokens, never between two.
    enough = int(np.quantile(lengths, 1 - MAY_BE_CUT, method="inverted_cdf"))
    return float((lengths > text.length).mean()), enough


def cut_line(task: Task, train: Manifest) -> str:
    """Says what share of the texts loses its end, and the length at which 1% would."""
    share, enough = cut_share(task, train)
    of_reader, _ = cut_share(task, train, of_reader=True)
    field = "model.modalities.text.length"
    said = []
    if share:
        length = task.modalities["text"].length
        said.append(
            f"{share:.1%} of texts are cut at {field}={length}: {enough} would cut at most 1%"
        )
    if of_reader:
        said.append(f"{of_reader:.1%} of texts are cut for the reader of a contrast")
    return "; ".join(said)


def moments_line(train: Any) -> str:
    """Says that a moment that is rounded to the nearest stays at its maximum for ever."""
    slowest = max(train.b1, train.b2)
    frozen = train.moments_dtype == "bfloat16" and train.moments_rounding == "nearest"
    if not frozen or slowest <= FREEZES:
        return ""
    return (
        f"Adam's moments in bfloat16 never fall at a decay of {slowest:g}, so that updates stay "
        "too small: in a new run set train.moments_rounding=stochastic"
    )


def average_line(train: Any) -> str:
    """Says how much of the random start the averaged parameters hold, which are scored."""
    left = train.ema_decay**train.steps
    if train.ema_warmup or left <= MAY_BE_START:
        return ""
    return (
        f"the averaged parameters hold {left:.1%} of their random start after {train.steps:,} "
        "steps: in a new run set train.ema_warmup=True"
    )


def crop_lines(task: Task, train: Manifest) -> list[str]:
    """Says of each modality how many of its items are longer than the model takes in at a time."""
    lines = []
    writes = any(isinstance(each, (Captioning, Transcription)) for each in task.objectives)
    for name, modality in task.modalities.items():
        parts = [record.parts[name] for record in train.records if name in record.parts]
        if not parts or not (hasattr(modality, "windows") or hasattr(modality, "longer")):
            continue
        middle = not hasattr(modality, "windows")
        longer = modality.longer if middle else (lambda part, m=modality: len(m.windows(part)) > 1)
        places = np.linspace(0, len(parts) - 1, min(len(parts), MEASURED), dtype=int)
        long = sum(longer(parts[place]) for place in places)
        texts = ", and texts are written about the beginning" * (writes and not middle)
        if long:
            lines.append(
                f"{long:,} of {len(places):,} {name}s that were looked at are longer than "
                f"model.modalities.{name}.seconds={modality.seconds:g}: training takes a random "
                f"part of each, evaluation the {'middle' if middle else 'mean of several'}{texts}"
            )
    return lines


def short_lines(task: Task, train: Manifest) -> list[str]:
    """Says which of `MEASURED` sounds have fewer steps in time than their transcripts need."""
    lines = []
    places = np.linspace(0, len(train.records) - 1, min(len(train.records), MEASURED), dtype=int)
    heard = [train.records[place] for place in places]
    for each in task.objectives:
        if isinstance(each, Transcription) and hasattr(task.modalities[each.of], "steps_of"):
            short = each.too_short(task.modalities[each.of], heard)
            if short:
                lines.append(
                    f"{len(short):,} of {len(heard):,} {each.of} items are too short for their "
                    f"transcripts, and objectives.{each.name} learns nothing of them: first "
                    f"{', '.join(str(record.id) for record in short[:5])}; more "
                    f"objectives.{each.name}.slots or shorter patches give them room"
                )
    return lines


def foils_line(task: Task, train: Manifest) -> str:
    """Says what share of the captions has no foil, where contrast takes foils for negatives."""
    if not task.foiled:
        return ""
    texts = [(text, record.foils) for record in train.records for text in record.texts]
    captions = [(text.target, {of for of, _ in foils}) for text, foils in texts if not text.prompt]
    without = sum(caption not in foiled for caption, foiled in captions)
    return (
        f"{without / len(captions):.1%} of {len(captions):,} training captions have no foil for "
        f"objectives.{task.foiled[0].name}.foils: they are held against the batch's texts alone"
    )


def mirror_line(config: Config, task: Task) -> str:
    """Says that mirroring knows the sides that captions name in English, and no others."""
    mirrored = [n for n, modality in task.modalities.items() if getattr(modality, "mirror", False)]
    if not mirrored:
        return ""
    own = {name for name in mirrored if "mirror" in config.model.modalities[name]}
    what = ["pictures"] * (set(mirrored) != own) + [f"{name} items" for name in sorted(own)]
    fields = ["data.mirror"] * (set(mirrored) != own)
    fields += [f"model.modalities.{name}.mirror" for name in sorted(own)]
    return (
        f"training mirrors half of the {' and '.join(what)}, but for those of which a text says "
        "left or right in English: where texts name sides in another language, set "
        f"{' and '.join(fields)}=False"
    )
