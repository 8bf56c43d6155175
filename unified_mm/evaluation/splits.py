"""The parts of a run's data that are scored, as its config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unified_mm.config import Config
from unified_mm.data.cleaning import cleaned
from unified_mm.data.manifest import without_bad_parts
from unified_mm.data.negatives import negatives
from unified_mm.data.records import Manifest
from unified_mm.data.sources import Source, foils_of, questions_of
from unified_mm.evaluation.evaluate import Split, is_scored
from unified_mm.evaluation.few_shot import FewShot


def evaluated_splits(config: Config, source: Source) -> list[str]:
    """Returns the split to score, then those of `evaluation.also` that the data has.

    Raises:
      ValueError: the data has no split of the name `evaluation.split`.
    """
    there = source.splits()
    wanted = config.evaluation.split
    if wanted not in there:
        raise ValueError(
            f"evaluation.split={wanted!r} is not in {source.folder}, which has "
            f"{', '.join(there)}; choose one of these"
        )
    return [wanted, *(name for name in config.evaluation.also if name in there and name != wanted)]


def read_manifest(
    config: Config, source: Source, name: str, modalities: Mapping[str, Any]
) -> Manifest:
    """Returns the examples of a split of which every part can be read.

    Raises:
      ValueError: more than `data.max_bad_share` of what a modality reads is bad.
    """
    manifest = cleaned(config.data, source.manifest(name))
    return without_bad_parts(manifest, modalities, config.data.max_bad_share)


def open_split(
    config: Config,
    source: Source,
    name: str,
    modalities: Mapping[str, Any],
    *,
    with_negatives: bool = True,
) -> Split:
    """Returns what is scored of a split, up to `evaluation.max_images` images.

    Questions are scored where the config asks for them, and where there is nothing else.
    """
    options = config.evaluation
    manifest = read_manifest(config, source, name, modalities)
    # A model of texts alone is scored on the captions of images, which it does not see.
    contexts = tuple(name for name in modalities if name != "text") or ("image",)
    captioned = any(is_scored(record, contexts) for record in manifest.records)
    asked = asks_questions(config) or not captioned
    questions = questions_of(source, name) if asked else ()
    if options.negatives_of and not options.negatives:
        raise ValueError("evaluation.negatives_of needs evaluation.negatives above 0: how many")
    made = options.negatives if with_negatives else 0
    split = Split(
        manifest,
        foils_of(source, name),
        questions,
        questions_of(source, config.data.train_split) if questions else (),
        few_shot(config, source, modalities) if options.shots else FewShot(),
        contexts,
        options.transcripts,
        negatives(modalities, made, options.negatives_of) if made else (),
    )
    return split.first(options.max_images)


def asks_questions(config: Config) -> bool:
    """Returns whether a config asks for questions to be scored, whatever else there is."""
    data, options = config.data, config.evaluation
    return bool(data.question_share > 0 or data.documents.questions or options.questions)


def few_shot(config: Config, source: Source, modalities: Mapping[str, Any]) -> FewShot:
    """Returns the settings of few-shot scoring.

    Raises:
      ValueError: the captioning rule is not an interleaved one.
    """
    rule = config.objectives.captioning.rule
    if not rule.startswith("interleaved"):
        raise ValueError(
            f"evaluation.shots needs objectives.captioning.rule='interleaved' or "
            f"'interleaved_latest', is {rule!r}"
        )
    options = config.evaluation
    return FewShot(
        shots=tuple(options.shots),
        support=read_manifest(config, source, config.data.train_split, modalities).records,
        images=options.few_shot_images,
        questions=options.few_shot_questions,
        seed=config.seed,
    )
