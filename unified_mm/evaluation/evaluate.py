"""The standard scores of a model on one split, with chance, ceilings and examples to look at."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from unified_mm.data.coco import Foil, Question
from unified_mm.data.records import Manifest, Record, Text
from unified_mm.data.sounds import library
from unified_mm.evaluation import answers, retrieval
from unified_mm.evaluation.caption_scores import CHARACTERS, caption_scores
from unified_mm.evaluation.classification import many_class_scores, one_class_scores, some_of
from unified_mm.evaluation.few_shot import FewShot, check_few_shot, few_shot_scores
from unified_mm.evaluation.transcripts import empty_shares, transcript_scores
from unified_mm.inference.predictor import Predictor, mean_directions, window_means
from unified_mm.objectives.captioning import Captioning
from unified_mm.objectives.classification import Classification
from unified_mm.objectives.contrastive import Contrastive
from unified_mm.objectives.transcription import Transcription
from unified_mm.task import Task

SINGLE = "single_caption/"  # names of scores with one caption an image


@dataclass(frozen=True)
class Split:
    """A split of the data with everything that is scored on it.

    Attributes:
      manifest: the images with their captions.
      foils: captions, and the same captions made false in one word.
      questions: questions about the images.
      train_questions: questions of the training split, for a baseline that sees no images.
      few_shot: the settings of few-shot scoring.
      contexts: the modalities that the model reads beside texts.
      transcripts: what normalises captions that are transcripts (`evaluation.transcripts`).
      negatives: examples of silence, noise and sounds of which nothing is to be written.
    """

    manifest: Manifest
    foils: Sequence[Foil] = ()
    questions: Sequence[Question] = ()
    train_questions: Sequence[Question] = ()
    few_shot: FewShot = FewShot()
    contexts: tuple[str, ...] = ("image",)
    transcripts: str = ""
    negatives: Sequence[Record] = ()

    @property
    def captioned(self) -> list[Record]:
        """The images, or what else the model reads, that have captions."""
        return [record for record in self.manifest.records if is_scored(record, self.contexts)]

    @property
    def asked(self) -> list[tuple[Record, Question]]:
        """The questions on examples that are there, with these."""
        by_id = {record.id: record for record in self.manifest.records}
        return [(by_id[q.image_id], q) for q in self.questions if q.image_id in by_id]

    @property
    def shown(self) -> list[Record]:
        """The images that texts are written about: those with captions, else with questions."""
        return self.captioned or list({record.id: record for record, _ in self.asked}.values())

    def first(self, count: int) -> Split:
        """Returns the split cut to its first `count` images and what belongs to them.

        Of examples with classes, which folders list class by class, it is so many evenly spread.
        """
        records = self.manifest.records
        if len(records) > count and any(record.labels for record in records):
            places = np.linspace(0, len(records) - 1, count).round().astype(int)
            records = tuple(records[place] for place in places)
        records = records[:count]
        kept = {record.id for record in records}
        return replace(
            self,
            manifest=replace(self.manifest, records=records),
            foils=tuple(foil for foil in self.foils if foil.image_id in kept),
            questions=tuple(each for each in self.questions if each.image_id in kept),
        )


@dataclass
class Scores:
    """The scores of a model by their fixed names, with their chance levels and upper bounds.

    Attributes:
      scores: what the model reaches.
      chance: what guessing reaches.
      ceiling: what a perfect model would reach.
      images: the records that were scored, in order.
      captions: what the model wrote, one for each image.
      questions: the questions that were scored.
      answers: what the model wrote, one for each of them.
      transcripts: by the objective that heard it, the records with what it heard.
      normalisers: by which transcripts were scored, by what they are called among the scores.
      warnings: what a reader of the scores has to know.
      image_embeddings: [images, Z].
      text_embeddings: [texts, Z], by record and caption.
      texts: the captions that were embedded, in the same order.
      image_of_text: for each text, the index of its image in `images`.
    """

    scores: dict[str, float] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    ceiling: dict[str, float] = field(default_factory=dict)
    images: list[Record] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    transcripts: dict[str, list[tuple[Record, str]]] = field(default_factory=dict)
    normalisers: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    image_embeddings: Any = None
    text_embeddings: Any = None
    texts: list[str] = field(default_factory=list)
    image_of_text: Any = None

    @property
    def said(self) -> dict[str, Any]:
        """The entry of results that says how transcripts were normalised, where there are some."""
        return {"normalisers": self.normalisers} if self.normalisers else {}

    def add(self, scores: dict, chance: dict | None = None, ceiling: dict | None = None) -> None:
        self.scores |= scores
        self.chance |= chance or {}
        self.ceiling |= ceiling or {}


def check_split(split: Split, task: Task) -> None:
    """Checks that a split can be scored, before a run is trained.

    Raises:
      ValueError: no image has a caption, or a question that the model could answer, or only one
        has a caption and the model writes captions, or its texts have no begin token, or as
        `check_few_shot` does.
    """
    images = len(split.captioned)
    writes = any(isinstance(objective, Captioning) for objective in task.objectives)
    where = f"split {split.manifest.split!r} in {split.manifest.folder}"
    contrasts = [each for each in task.objectives if isinstance(each, Contrastive)]
    others = [pair for each in contrasts for pair in each.pairs if set(pair) != {"image", "text"}]
    compared = any(r.has(a) and r.has(b) for r in split.manifest.records for a, b in others)
    if split.negatives and not writes and not transcriptions(task):
        raise ValueError(
            f"evaluation.negatives={len(split.negatives)}: this model writes nothing about any "
            "sound: set it to 0"
        )
    if images and writes and task.tokenizer.bos_id is None:
        raise ValueError(
            "this model's texts have no begin token, so that no caption could be begun or scored: "
            "name one that the tokenizer knows with data.special_tokens.bos, such as the "
            "<|endoftext|> of Qwen"
        )
    found = [each for each in classifications(task) if classified_records(split, each)]
    alike = [alike_line(each, classified_records(split, each)) for each in found]
    classified = not all(alike)
    transcribed = [each for each in transcriptions(task) if transcribed_records(split, each)]
    if transcribed or (writes and split.transcripts):
        library("jiwer")  # an extra that is missing is said before training, not after it
    scored = images or compared or classified or transcribed
    if not scored and not (writes and split.asked):
        if alike:
            raise ValueError(f"{where}: {alike[0]}")
        unanswered = f"; its {len(split.asked)} questions need objectives.captioning"
        raise ValueError(
            f"{where} has no image with a caption: there is nothing to score"
            + unanswered * bool(split.asked)
        )
    if images == 1 and writes:
        raise ValueError(
            f"{where} has 1 image with a caption to be scored, and captions are scored over two at "
            "least: CIDEr-D compares images. Add images, raise evaluation.max_images, or choose "
            "another evaluation.split"
        )
    if writes and split.few_shot.shots:
        check_few_shot(task.modalities["text"], split.shown, split.questions, split.few_shot)


def evaluate(predictor: Predictor, split: Split, *, batch_size: int) -> Scores:
    """Returns every score that the model and the split allow.

    Args:
      predictor: the model.
      split: images with captions, and perhaps foils and questions.
      batch_size: examples in a batch; the same throughout, so that equal inputs give equal
        outputs.

    Raises:
      ValueError: `check_split` refuses the split, `batch_size` is below 1, or embeddings are not
        finite.
    """
    if batch_size < 1:
        raise ValueError(f"evaluation.batch_size={batch_size}: must be at least 1")
    check_split(split, predictor.task)
    found = Scores(images=split.captioned)
    score_retrieval(predictor, split, found, batch_size)
    score_compared_foils(predictor, split, found, batch_size)
    score_classes(predictor, split, found, batch_size)
    score_transcriptions(predictor, split, found, batch_size)
    if not predictor.can(Captioning):
        return found
    if found.images:
        score_captions(predictor, split, found, batch_size)
        score_gain(predictor, split, found, batch_size)
        score_foils(predictor, split, found, batch_size)
    score_answers(predictor, split, found, batch_size)
    if split.few_shot.shots:
        asked = (split.shown, split.questions, split.few_shot)
        found.add(few_shot_scores(predictor, *asked, batch_size))
    return found


def is_scored(record: Record, contexts: Sequence[str] = ("image",)) -> bool:
    """Returns whether a record has both an image, or another of the contexts, and a caption."""
    return any(record.has(name) for name in contexts) and bool(captions_of(record))


def captions_of(record: Record) -> list[str]:
    """Returns the captions of a record: its texts without a prompt."""
    return [text.target for text in record.texts if not text.prompt]


def score_retrieval(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds the retrieval scores of every two modalities that were held against each other.

    Those with texts are taken with all captions, and with each example's first one.
    """
    named: set[frozenset[str]] = set()
    for contrast in predictor.task.contrasts():
        for one, other in contrast.pairs:
            records = [r for r in split.manifest.records if r.has(one) and r.has(other)]
            if one == other or not records:
                continue
            # A pair that was learned twice bears the names of its objectives.
            both = frozenset((one, other))
            prefix = f"{contrast.name}/" if both in named else ""
            named.add(both)
            rows = _as_rows(records, other)
            vectors = [
                over_windows(
                    predictor,
                    each,
                    of,
                    batch_size,
                    partial(predictor.embed, of=of, objective=contrast.name),
                    found,
                    mean_directions,
                )
                for of, each in ((one, records), (other, rows))
            ]
            owner = np.array([row.id for row in rows])
            add_retrieval(found, prefix, (one, other), vectors, owner, rows)
            if (one, other) == ("image", "text") and not prefix:
                found.image_embeddings, found.text_embeddings = vectors
                found.texts, found.image_of_text = [_caption(row) for row in rows], owner


def classifications(task: Task) -> list[Classification]:
    """Returns the objectives of a task that classify."""
    return [each for each in task.objectives if isinstance(each, Classification)]


def classified_records(split: Split, objective: Classification) -> list[Record]:
    """Returns the examples that an objective is scored on: those with labels, of many all."""
    records = [record for record in split.manifest.records if record.has(objective.of)]
    return [record for record in records if record.labels or objective.many]


def alike_line(objective: Classification, records: Sequence[Record]) -> str:
    """Says that examples cannot be told apart by their tags; '' where they can."""
    if not objective.many or some_of(classes_of(records, objective.classes)):
        return ""
    return (
        f"no class of objectives.{objective.name} is there in some of the {len(records)} examples "
        "and not in others, so that it cannot be scored: data.fields.label names their field"
    )


def classes_of(records: Sequence[Record], names: Sequence[str]) -> Bool[np.ndarray, "B C"]:
    """Returns which classes records have."""
    return np.array([[name in record.labels for name in names] for record in records])


def score_classes(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds the scores of every classification; examples of unknown classes count as wrong."""
    for objective in classifications(predictor.task):
        records = classified_records(split, objective)
        if not records:
            continue
        if alike := alike_line(objective, records):
            found.warnings.append(alike)
            continue
        names = objective.classes
        strange = [record for record in records if set(record.labels) - set(names)]
        if strange:
            found.warnings.append(
                f"{len(strange)} of {len(records)} examples are of classes that the model does not "
                f"know, first {strange[0].labels}: objectives.{objective.name} is wrong about them"
            )
        labels = classes_of(records, names)
        rated = over_windows(
            predictor,
            records,
            objective.of,
            batch_size,
            partial(predictor.class_probabilities, objective=objective),
            found,
        )
        if objective.many:
            scores, chance = many_class_scores(rated, labels)
        else:
            scores, chance = one_class_scores(rated, labels, names)
        found.add(
            *({f"{objective.name}/{k}": v for k, v in each.items()} for each in (scores, chance))
        )


def transcriptions(task: Task) -> list[Transcription]:
    """Returns the objectives of a task that transcribe."""
    return [each for each in task.objectives if isinstance(each, Transcription)]


def transcribed_records(split: Split, objective: Transcription) -> list[Record]:
    """Returns the examples that an objective is scored on: those with a transcript."""
    return [record for record in split.manifest.records if is_scored(record, (objective.of,))]


def score_transcriptions(
    predictor: Predictor, split: Split, found: Scores, batch_size: int
) -> None:
    """Adds the error rates of every transcription."""
    for objective in transcriptions(predictor.task):
        records = transcribed_records(split, objective)
        if not records:
            continue

        def transcribe(records: Sequence[Record], objective: Any = objective) -> list[str]:
            hear = partial(predictor.transcribe, objective=objective)
            return predictor.over(records, batch_size, hear)

        heard = transcribe(records)
        found.transcripts[objective.name] = list(zip(records, heard, strict=True))
        found.normalisers[objective.name] = objective.normaliser
        add_error_rates(found, objective.name)
        add_empty_shares(found, objective.name, split, transcribe)


def add_error_rates(found: Scores, name: str) -> None:
    """Adds the error rates of what was heard."""
    records, heard = zip(*found.transcripts[name], strict=True)
    references = [captions_of(record)[0] for record in records]
    parts = transcript_scores(heard, references, found.normalisers[name])
    found.add(*({f"{name}/{key}": value for key, value in part.items()} for part in parts))


def add_empty_shares(
    found: Scores, name: str, split: Split, write: Callable[[Sequence[Record]], list[str]]
) -> None:
    """Adds how often nothing is written where nothing was said."""
    if split.negatives:
        empty = empty_shares(split.negatives, write(split.negatives))
        found.add({f"{name}/{key}": value for key, value in empty.items()})


def over_windows(
    predictor: Predictor,
    records: Sequence[Record],
    of: str,
    batch_size: int,
    function: Any,
    found: Scores,
    mean: Callable[[np.ndarray, Sequence[int]], np.ndarray] = window_means,
) -> Any:
    """Returns what a function says of a modality of records, the mean over windows of long ones.

    How many are long is said among the warnings.
    """
    modality = predictor.task.modalities[of]
    if not hasattr(modality, "windows"):
        return np.array(predictor.over(records, batch_size, function))
    parts = [modality.windows(record.parts[of]) for record in records]
    rows = [
        replace(record, parts={**record.parts, of: part})
        for record, each in zip(records, parts, strict=True)
        for part in each
    ]
    counts = np.array([len(each) for each in parts])
    if len(rows) > len(records):
        said = (
            f"{int((counts > 1).sum())} of {len(records)} {of}s are longer than the model hears: "
            f"of these, {int(counts[counts > 1].sum())} windows were heard and averaged"
        )
        found.warnings += [said] if said not in found.warnings else []
    return mean(np.array(predictor.over(rows, batch_size, function)), counts.tolist())


def _as_rows(records: Sequence[Record], of: str) -> list[Record]:
    """Returns the candidates of a modality, a row each, their `id` the number of their record."""
    if of != "text":
        return [replace(record, id=number) for number, record in enumerate(records)]
    return [
        Record(number, {}, (Text("", caption),), False)
        for number, record in enumerate(records)
        for caption in captions_of(record)
    ]


def _caption(row: Record) -> str:
    return row.texts[0].target


def add_retrieval(
    found: Scores,
    prefix: str,
    pair: tuple[str, str],
    vectors: Sequence[Any],
    owner: Int[np.ndarray, " rows"],
    rows: Sequence[Record],
) -> None:
    """Adds the scores of one pair of modalities, named by both.

    Args:
      prefix: of the names.
      pair: the two modalities.
      vectors: of the first one's items, and of the rows.
      owner: for each row, the number of its item.
      rows: of the second modality.
    """
    one, other = pair
    names = {"text_to_image": f"{other}_to_{one}", "image_to_text": f"{one}_to_{other}"}
    first = np.flatnonzero(np.diff(owner, prepend=-1))
    chosen = [("", np.arange(len(rows)))]
    if other == "text":
        chosen.append((SINGLE, first))
    for kind, part in chosen:
        of_row = owner[part]
        # What the tokenizer makes equal no model can tell apart.
        seen = [_caption(rows[i]).lower() if other == "text" else str(i) for i in part.tolist()]
        parts = (
            retrieval.retrieval_scores(vectors[0], vectors[1][part], of_row),
            retrieval.chance(of_row, len(vectors[0])),
            retrieval.duplicate_caption_ceiling(seen, of_row),
        )
        found.add(*({prefix + kind + _named(k, names): v for k, v in p.items()} for p in parts))


def _named(score: str, names: Mapping[str, str]) -> str:
    direction, _, rest = score.partition("/")
    return f"{names[direction]}/{rest}"


def score_captions(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds the scores of greedy captions against their references.

    Chance is the score of the captions against the references of other images.
    """

    def write(records: Sequence[Record]) -> list[str]:
        return predictor.over(
            records, batch_size, lambda batch: predictor.write(batch, [""] * batch_size)
        )

    found.captions = write(found.images)
    if split.transcripts:
        found.transcripts["caption"] = list(zip(found.images, found.captions, strict=True))
        found.normalisers["caption"] = split.transcripts
        add_error_rates(found, "caption")
    add_empty_shares(found, "caption", split, write)
    references = [captions_of(record) for record in found.images]
    scores = caption_scores(found.captions, references)
    found.add({f"caption/{name}": value for name, value in scores.items()})
    if any(name.startswith(CHARACTERS) for name in scores):
        found.warnings.append(
            "most references are of scripts without spaces between words: caption/characters/... "
            "compares their characters; caption/cider_d, bleu and rouge_l take a sentence for a "
            "word, and say little here (evaluation.best_by chooses what best/ goes by)"
        )
    # Chance of a caption is that of a fluent one about another picture: all moved on by half.
    half = len(references) // 2
    moved = found.captions[half:] + found.captions[:half]
    shuffled = caption_scores(moved, references)
    found.add({}, {f"caption/{name}": value for name, value in shuffled.items()})


def score_gain(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds how much likelier a caption is beside its own image than beside another one.

    Where no example has an image, it is of the first modality that one has. The gain is in nats per
    token, over the first caption of each image; the other images are all shifted by half of the
    list. Its 95% interval is that of a mean over captions.
    """
    order = sorted(split.contexts, key=lambda name: name != "image")
    of = next(name for name in order if any(record.has(name) for record in found.images))
    shown = [record for record in found.images if record.has(of)]
    if len(shown) < 2:
        return  # there is no other one
    rows = [replace(r, texts=(Text("", captions_of(r)[0]),)) for r in shown]
    half = len(rows) // 2
    moved = [other.parts[of] for other in rows[half:] + rows[:half]]
    strangers = [
        replace(row, parts={**row.parts, of: part}) for row, part in zip(rows, moved, strict=True)
    ]

    def nats(records: Sequence[Record]) -> np.ndarray:
        scored = np.array(predictor.over(records, batch_size, predictor.log_likelihood))
        return -scored[:, 0] / scored[:, 1]

    own, other = nats(rows), nats(strangers)
    gain = other - own
    spread = 1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5
    found.add(
        {
            "caption/nats": float(own.mean()),
            f"caption/{of}_gain": float(gain.mean()),
            f"caption/{of}_gain_low": float(gain.mean()) - spread,
            f"caption/{of}_gain_high": float(gain.mean()) + spread,
        },
        {"caption/nats": float(other.mean()), f"caption/{of}_gain": 0.0},
    )


def score_foils(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds how often a caption is likelier than the same caption with one word made false.

    Foils on images that the split lacks are skipped; if no others are left, nothing is added.
    """
    by_id = {record.id: record for record in split.manifest.records if record.image}
    foils = [foil for foil in split.foils if foil.image_id in by_id]
    if not foils:
        return

    def likelihoods(texts: Sequence[str]) -> np.ndarray:
        rows = [
            replace(by_id[foil.image_id], texts=(Text("", text),))
            for foil, text in zip(foils, texts, strict=True)
        ]
        return np.array(predictor.over(rows, batch_size, predictor.log_likelihood))[:, 0]

    right = likelihoods([f.caption for f in foils]) > likelihoods([f.foil for f in foils])
    add_foils(found, "foil", foils, right)


def score_compared_foils(
    predictor: Predictor, split: Split, found: Scores, batch_size: int
) -> None:
    """Adds how often an item of another modality than image is nearer to its caption than its foil.

    Of pictures the captioner is asked, by `score_foils`.
    """
    for of in predictor.task.modalities:
        by_id = {record.id: record for record in split.manifest.records if record.has(of)}
        foils = [foil for foil in split.foils if foil.image_id in by_id]
        contrasts = predictor.task.contrasts(of, "text")
        if of in ("image", "text") or not foils or not contrasts:
            continue

        def vectors(rows: Sequence[Record], of: str, space: str = contrasts[0].name) -> Any:
            embed = partial(predictor.embed, of=of, objective=space)
            return over_windows(predictor, rows, of, batch_size, embed, found, mean_directions)

        records = list({foil.image_id: by_id[foil.image_id] for foil in foils}.values())
        place = {record.id: number for number, record in enumerate(records)}
        items = vectors(records, of)[[place[foil.image_id] for foil in foils]]
        true, false = (
            vectors([Record(0, {}, (Text("", text),), False) for text in texts], "text")
            for texts in ([foil.caption for foil in foils], [foil.foil for foil in foils])
        )
        add_foils(found, f"foil/{of}", foils, np.einsum("IZ,IZ->I", items, true - false) > 0)


def add_foils(
    found: Scores, name: str, foils: Sequence[Foil], right: Bool[np.ndarray, " foils"]
) -> None:
    """Adds the share of foils that were told from their captions, of all and of each kind."""
    kinds = np.array([foil.kind for foil in foils])
    scores = {f"{name}/accuracy": float(right.mean())}
    for kind in sorted(set(kinds)):
        scores[f"{name}/accuracy/{kind}"] = float(right[kinds == kind].mean())
    found.add(scores, dict.fromkeys(scores, 0.5))


def score_answers(predictor: Predictor, split: Split, found: Scores, batch_size: int) -> None:
    """Adds the VQA accuracy of greedy answers, with that of `question_prior` as chance.

    Questions on images that the split lacks are skipped; if no others are left, nothing is added.
    """
    if not split.asked:
        return
    # Batches of questions that need no picture come first: they are answered without one.
    alone = predictor.sure([question.question for _, question in split.asked])
    ordered = sorted(split.asked, key=lambda each: each[1].question not in alone)
    rows, asked = zip(*ordered, strict=True)
    prompts = itertools.chain(
        (question.question for question in asked), itertools.repeat(asked[-1].question)
    )
    found.questions, found.answers = (
        list(asked),
        predictor.over(
            rows,
            batch_size,
            lambda batch: predictor.write(batch, list(itertools.islice(prompts, batch_size))),
        ),
    )
    prior = answers.question_prior(split.train_questions, asked) if split.train_questions else None
    found.add(answers.answer_scores(found.answers, asked), prior)
