"""Finds how early a run's tokens may leave its layers, with a stated risk, and keeps it in the run.

    python -m unified_mm.calibrate --run runs/first
    python -m unified_mm.calibrate --run runs/first --tolerance 0.03 --error 0.1 --replace

The run must have exits (model.exits, objectives.exits), answer questions, or write captions, for
--pictures. A token leaves where
its likeliest word is ahead of the next one by a threshold. The one that is found lets all layers
disagree with at most --tolerance of the tokens of a text, in the mean over examples, but for a
chance of --error that the examples of the split mislead; captions and answers have one each. Where
the split has questions, and the model can read them alone (early fusion), an answer stands without
its picture where it is as likely as another threshold, which changes at most --tolerance of them.
With --pictures, what a picture is worth to its caption is foreseen from its stem, by half of the
examples, and a threshold found on the others: pictures below it are not read, and at most
--tolerance of all captions lose more than 0.05 nats a token by that.
`generate --exits` and `main --mode=evaluate --exits` use them. Beside each stands what a text by
itself is then expected to cost, by the shares that were measured: `compare` shows it. The last line
printed is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from functools import partial
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.files import write_json
from unified_mm.runs.folder import RunFolder

# From safe to bold; chosen before any example is seen.
THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.02, 0.0)
LEVELS = 41  # of what pictures are worth, from the least to the most
NEEDED = 0.05  # nats a token: a caption that loses more needed its picture


@command(
    "calibrate",
    __doc__,
    needs=("run",),
    takes=("best", "split", "max_images", "data_dir", "tolerance", "error", "pictures", "replace"),
)
def main(options: argparse.Namespace) -> int:
    """Calibrates the exits of a run, writes them into it and returns the exit code.

    Raises:
      ValueError: there are exits already and --replace is not given, the run has none to calibrate,
        or no threshold keeps the tolerance.
    """
    from unified_mm.evaluation.splits import asks_questions
    from unified_mm.inference.loaded import load
    from unified_mm.inference.question_only import can_answer_alone
    from unified_mm.quantize import open_scored
    from unified_mm.runs.environment import device_name, revision, versions

    folder = RunFolder(options.run)
    if folder.exits.exists() and not options.replace:
        raise ValueError(f"{folder.exits} is there: give --replace to calibrate the run anew")
    model = load(options.run, best=options.best)
    exits = model.task.model.options.exits
    without = (
        f"{folder.path} has no exits: train a run with --config.model.exits='(4,)', the layers "
        "after which one may leave, and --config.objectives.exits.weight=1; or give --pictures to "
        "find those that captions do not need"
    )
    alone = can_answer_alone(model.task)
    if options.pictures and not (alone and model.task.model.context_names):
        raise ValueError(
            f"--pictures: the model of {folder.path} does not write both beside a picture and "
            "without one, as early fusion with objectives.captioning does: leave it out"
        )
    # What other data holds is seen when it is opened.
    asks = alone and (asks_questions(model.config) or bool(options.data_dir))
    if not (exits or options.pictures or asks):
        raise ValueError(f"{without}; or where it answers questions, give --data_dir with some")
    split, data = open_scored(model, options)
    asks = alone and bool(split.asked)
    if options.pictures and len(split.captioned) < 2:
        raise ValueError(
            f"--pictures: the split {split.manifest.split!r} of {data['folder']} has "
            f"{len(split.captioned)} pictures with captions, and it takes two at least: give "
            "another --split, or leave it out"
        )
    if not (exits or options.pictures or asks):
        raise ValueError(without)
    risk = options.tolerance, options.error
    found = calibrated(model, split, *risk) if exits else {}
    if asks:
        found |= calibrated_alone(model, split, found, *risk)
    if options.pictures:
        found |= calibrated_pictures(model, split, found, *risk)
    if not found:
        raise ValueError(
            f"no threshold keeps --tolerance={options.tolerance} with --error={options.error} on "
            "these examples: allow more, or calibrate on more of them (--max_images)"
        )
    result = {
        "layers": list(exits),
        "step": model.step,
        "state": model.state,
        "dtype": str(model.task.model.options.dtype),
        "texts": found,
        "split": split.manifest.split,
        "data": data,
        "device": device_name(),
        "versions": versions(),
        "revision": revision(),
    }
    write_json(folder.exits, result)
    say(f"exits: {folder.exits}")
    for each in found.values():
        each.pop("worth", None)  # thousands of numbers, which the file has
    say(json.dumps(result))
    return 0


def calibrated(model: Any, split: Any, tolerance: float, error: float) -> dict[str, Any]:
    """Returns by kind of text its threshold and what it was found with; kinds without are said."""
    from unified_mm.evaluation.exits import texts_of
    from unified_mm.inference.calibration import calibrate
    from unified_mm.inference.text_flops import text_flops

    found = {}
    for kind, (records, prompts) in texts_of(split).items():
        written: dict[float, Any] = {}
        losses_at = partial(losses, model, kind, records, prompts, written)
        best = calibrate(losses_at, THRESHOLDS, tolerance, error)
        if best is None:
            say(f"{kind}: no threshold keeps {tolerance} on {len(records):,} examples: all layers")
        else:
            texts = written[best.threshold]
            say(f"{kind}: leaves at {best.threshold}, depth {texts.depth:.3f}")
            counted = partial(text_flops, model.predictor, prompts, texts.tokens)
            found[kind] = {
                **dataclasses.asdict(best),
                "depth": texts.depth,
                "left": list(texts.left),
                "flops": of_a_text(kind, len(prompts), counted(), counted(texts.left)),
            }
    return found


def calibrated_alone(
    model: Any, split: Any, early: dict[str, Any], tolerance: float, error: float
) -> dict[str, Any]:
    """Returns the threshold for answers without a picture, by its kind; none is said.

    What an answer costs is with those that leave layers early, as `early` says.
    """
    import numpy as np

    from unified_mm.evaluation.exits import texts_of
    from unified_mm.inference.calibration import calibrate
    from unified_mm.inference.predictor import ANSWER
    from unified_mm.inference.question_only import QUESTION_ONLY, confidence, disagreement
    from unified_mm.inference.text_flops import text_flops

    records, prompts = texts_of(split)[ANSWER]
    known = model.predictor.answers_alone(prompts)
    alone = [known[prompt] for prompt in prompts]
    beside = answers_beside(model, records, prompts)

    def losses_at(threshold: float) -> Any:
        found = disagreement(alone, [text.text for text in beside], threshold)
        say(f"{QUESTION_ONLY} at {threshold}: {found.mean():.4f} of the answers would be others")
        return found

    best = calibrate(losses_at, THRESHOLDS, tolerance, error)
    if best is None:
        say(f"{QUESTION_ONLY}: no threshold keeps {tolerance}: all pictures are read")
        return {}
    reading = np.array([confidence(text) < best.threshold for text in alone])
    read = float(reading.mean())
    say(f"{QUESTION_ONLY}: stands at {best.threshold}, pictures read {read:.3f}")
    lengths, own = (
        np.array([len(text.tokens) for text in each], float) for each in (beside, alone)
    )
    full = text_flops(model.predictor, prompts, lengths)
    expected = text_flops(model.predictor.without_context(), prompts, own)
    expected += text_flops(
        model.predictor,
        list(itertools.compress(prompts, reading)),
        lengths[reading],
        early.get(ANSWER, {}).get("left", ()),
    )
    flops = of_a_text(QUESTION_ONLY, len(prompts), full, expected)
    return {QUESTION_ONLY: {**dataclasses.asdict(best), "read": read, "flops": flops}}


def calibrated_pictures(
    model: Any, split: Any, early: dict[str, Any], tolerance: float, error: float
) -> dict[str, Any]:
    """Returns the nats a token that a picture must be worth, by its kind; none is said.

    What pictures are worth is fitted to half of the examples, and the threshold found on the rest.
    An example that lacks one of several modalities is always read. Sounds in which nobody speaks
    (`evaluation.negatives_of`) are no part of the risk. What a caption costs is of those as long as
    the references, with layers left early as `early` says.
    """
    import numpy as np

    from unified_mm.inference.calibration import calibrate
    from unified_mm.inference.predictor import CAPTION
    from unified_mm.inference.text_flops import summary_flops, text_flops
    from unified_mm.inference.worth import PICTURE, Worth

    gains, tokens, summaries = worth_measured(model, split)
    # Drawn, for the order of a split may mean something.
    fitted, others = np.array_split(np.random.default_rng(0).permutation(len(gains)), 2)
    fitted = fitted[np.isfinite(summaries[fitted]).all(1)]
    worth = Worth.fit(summaries[fitted], gains[fitted])
    foreseen, gains, tokens = worth(summaries[others]), gains[others], tokens[others]

    def losses_at(threshold: float) -> Any:
        lost = (foreseen < threshold) & (gains > NEEDED)
        say(
            f"{PICTURE} below {threshold:.3f}: {(foreseen < threshold).mean():.3f} are not read, "
            f"{lost.mean():.4f} of the captions lose more than {NEEDED} nats a token"
        )
        return lost.astype(float)

    levels = np.quantile(worth(summaries[fitted]), np.linspace(0, 1, LEVELS)).tolist()
    best = calibrate(losses_at, levels, tolerance, error)
    if best is None:
        say(f"{PICTURE}: no threshold keeps {tolerance}: all pictures are read")
        return {}
    read = ~(foreseen < best.threshold)
    beside, alone = model.predictor, model.predictor.without_context()
    full = text_flops(beside, [""] * len(read), tokens)
    expected = len(read) * summary_flops(beside)
    left = early.get(CAPTION, {}).get("left", ())
    expected += text_flops(beside, [""] * int(read.sum()), tokens[read], left)
    expected += text_flops(alone, [""] * int((~read).sum()), tokens[~read])
    flops = of_a_text(PICTURE, len(read), full, expected)
    told = {"read": float(read.mean()), "flops": flops, "worth": dataclasses.asdict(worth)}
    return {PICTURE: {**dataclasses.asdict(best), **told}}


def worth_measured(model: Any, split: Any) -> tuple[Any, Any, Any]:
    """Returns of each picture its gain in nats a token, its caption's tokens and its summary.

    The gain is of its first caption, over the same read without the picture.

    Raises:
      ValueError: a caption's likelihood is not finite.
    """
    import numpy as np

    from unified_mm.data.records import Text
    from unified_mm.evaluation.evaluate import captions_of

    records = [
        dataclasses.replace(record, texts=(Text("", captions_of(record)[0]),))
        for record in split.captioned
    ]
    alone = model.predictor.without_context()

    def measured(batch: Any) -> Any:
        beside = model.predictor.log_likelihood(batch)
        without = alone.log_likelihood({"text": batch["text"]})
        gain = (beside - without)[:, :1] / beside[:, 1:]
        return np.concatenate([gain, beside[:, 1:], model.predictor.summaries(batch)], axis=1)

    rows = model.predictor.over(records, model.config.evaluation.batch_size, measured)
    gains, tokens, *summaries = np.array(rows, np.float64).T
    if len(bad := np.flatnonzero(~np.isfinite(gains))):
        raise ValueError(
            f"--pictures: the captions of {len(bad)} examples have no finite likelihood, first "
            f"{records[bad[0]].id!r}: weights are damaged, or numbers too narrow (model.dtype)"
        )
    return gains, tokens, np.stack(summaries, axis=1)


def of_a_text(kind: str, texts: int, full: int, expected: int) -> dict[str, int]:
    """Returns the FLOPs of one of some texts, where nothing is left out and expected; says them."""
    flops = {"full": round(full / texts), "expected": round(expected / texts)}
    say(
        f"{kind}: {flops['expected']:,} FLOPs expected of a text by itself, of {flops['full']:,} "
        f"where nothing is left out ({expected / full:.3f})"
    )
    return flops


def answers_beside(model: Any, records: Any, prompts: Any) -> list[Any]:
    """Returns the answer to each question beside its picture, by all layers."""
    whole = model.predictor.leaving({})
    asked = itertools.chain(prompts, itertools.repeat(prompts[0]))
    size = model.config.evaluation.batch_size
    texts = whole.over(
        records, size, lambda batch: whole.generate(batch, list(itertools.islice(asked, size)))
    )
    return [best for (best,) in texts]


def losses(
    model: Any, kind: str, records: Any, prompts: Any, written: dict[float, Any], threshold: float
) -> Any:
    """Returns the loss of each text of a kind at a threshold, says it, and notes the texts."""
    from unified_mm.evaluation.exits import early_texts

    early = model.predictor.leaving({kind: threshold})
    texts = early_texts(early, records, prompts, model.config.evaluation.batch_size)
    written[threshold] = texts
    say(
        f"{kind} at {threshold}: {texts.losses.mean():.4f} of the tokens would be others, depth "
        f"{texts.depth:.3f}"
    )
    return texts.losses


if __name__ == "__main__":
    main(sys.argv[1:])
