"""Results by variant as Markdown and CSV: intervals, differences from the base, and cost."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.reporting.kept import Result
from experiments.sweeping.ablation import Ablation
from unified_mm.analysis.intervals import Mean, mean_interval, paired_difference

TITLES = "seeds | mean (95%) | less the base (95%, paired) | | parameters | FLOPs"
EQUAL = 0.04  # relative difference of FLOPs or parameters called equal: widths go in steps


@dataclass(frozen=True)
class Line:
    """A variant's score.

    Attributes:
      variant: the variant of the ablation.
      score: the name of the score.
      value: the mean over its seeds; None if the variant does not have the score.
      difference: the paired difference from the base, over the seeds of both; None for the base.
      chance: the score of guessing; None if it is not known.
      parameters: the number of parameters of a run; None if it is not known.
      flops: the training FLOPs of a run.
      parameter_ratio: parameters over those of the base; None for the base.
      flops_ratio: FLOPs over those of the base; None for the base.
    """

    variant: str
    score: str
    value: Mean | None
    difference: Mean | None
    chance: float | None
    parameters: float | None
    flops: float
    parameter_ratio: float | None
    flops_ratio: float | None

    @property
    def verdict(self) -> str:
        """The verdict on the difference, such as 'within the noise'; '' for the base."""
        if self.difference is None:
            return ""
        if not self.difference.known:
            return "one seed"
        if not self.difference.excludes_zero:
            return "within the noise"
        return "higher" if self.difference.mean > 0 else "lower"


def summarise(ablation: Ablation, results: Sequence[Result]) -> list[Line]:
    """Returns a line for each score and each variant that has runs, in the order of the ablation.

    Raises:
      ValueError: if no run has any of the scores, or the name of a score looks misspelt.
    """
    by_variant = {
        name: [r for r in results if r.variant == name] for name in ablation.all_variants()
    }
    there = {name: found for name, found in by_variant.items() if found}
    base = there.get(ablation.base, [])
    known = {name for r in results for name in r.scores}
    scores = [score for score in ablation.scores if score in known]
    unknown = [score for score in ablation.scores if score not in known]
    for score in unknown if len(there) == len(by_variant) else ():
        if near := difflib.get_close_matches(score, known, n=1, cutoff=0.8):
            raise ValueError(f"no run has the score {score!r}; did you mean {near[0]}?")
    if not scores:
        raise ValueError(f"no run has any of the scores {', '.join(ablation.scores)}")
    return [
        line(name, score, found, base, is_base=name == ablation.base)
        for score in scores
        for name, found in there.items()
    ]


def line(
    variant: str, score: str, found: Sequence[Result], base: Sequence[Result], *, is_base: bool
) -> Line:
    """Returns the line of one variant, compared with the base."""
    values = {r.seed: r.scores[score] for r in found if score in r.scores}
    others = {r.seed: r.scores[score] for r in base if score in r.scores}
    chances = [r.chance[score] for r in found if score in r.chance]
    parameters, flops = mean([r.parameters for r in found]), mean([r.flops for r in found])
    base_parameters, base_flops = mean([r.parameters for r in base]), mean([r.flops for r in base])
    assert flops is not None
    return Line(
        variant=variant,
        score=score,
        value=mean_interval(np.array([*values.values()])) if values else None,
        difference=None if is_base else paired_difference(values, others),
        chance=mean(chances),
        parameters=parameters,
        flops=flops,
        parameter_ratio=None if is_base else ratio(parameters, base_parameters),
        flops_ratio=None if is_base else ratio(flops, base_flops),
    )


def mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, None if any value is missing or there is none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base else None


def markdown(lines: Sequence[Line]) -> str:
    """Returns a Markdown table for each score."""
    tables = []
    for score in dict.fromkeys(line.score for line in lines):
        chosen = [line for line in lines if line.score == score]
        rows = [markdown_row(line) for line in chosen]
        tables.append("\n".join([f"| `{score}` | {TITLES} |", "| --- " * 7 + "|", *rows]))
    return "\n\n".join(tables) + "\n"


def markdown_row(line: Line) -> str:
    """Returns the table row of one variant."""
    cells = [
        line.variant,
        str(line.value.count) if line.value else "0",
        said(line.value) + said_chance(line.chance) if line.value else "cannot",
        said(line.difference, signed=True) if line.difference else "",
        line.verdict,
        cost(line.parameters, line.parameter_ratio),
        cost(line.flops, line.flops_ratio),
    ]
    return "| " + " | ".join(cells) + " |"


def brief(lines: Sequence[Line]) -> str:
    """Returns one Markdown table with all scores and their differences from the base.

    Differences are bold if their interval excludes 0.
    """
    scores = list(dict.fromkeys(line.score for line in lines))
    heads = [f"`{short(score)}`" for score in scores]
    names = dict.fromkeys(line.variant for line in lines)
    rows = [[line for line in lines if line.variant == name] for name in names]
    usual = [line.chance for line in rows[0]]
    titles = ["", "seeds", *heads, "parameters", "FLOPs"]
    head = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    return "\n".join([*head, *(brief_row(row, usual) for row in rows)]) + "\n"


def brief_row(lines: Sequence[Line], usual: Sequence[float | None]) -> str:
    """Returns the table row of one variant; `usual` is the chance of each score for the base."""
    first = lines[0]
    seeds = max(line.value.count if line.value else 0 for line in lines)
    cells = [brief_cell(line, chance) for line, chance in zip(lines, usual, strict=True)]
    costs = [cost(first.parameters, first.parameter_ratio), cost(first.flops, first.flops_ratio)]
    return "| " + " | ".join([first.variant, f"{seeds}", *cells, *costs]) + " |"


def brief_cell(line: Line, usual: float | None) -> str:
    """Returns a score with its difference, and its chance if that is not the base's."""
    if line.value is None:
        return "cannot"
    if line.difference is None:
        return said(line.value) + said_chance(line.chance)
    differs = said(line.difference, signed=True)
    if line.difference.excludes_zero:
        sign, _, rest = differs.partition(" ")
        differs = f"**{sign}** {rest}"
    chance = said_chance(line.chance)
    return f"{line.value.mean:.3f}, {differs}{'' if chance == said_chance(usual) else chance}"


def said(value: Mean, *, signed: bool = False) -> str:
    """Returns a mean with its interval, as text."""
    sign = "+" if signed else ""
    first = f"{value.mean:{sign}.3f}"
    if not value.known:
        return first
    return f"{first} ({value.low:{sign}.3f} to {value.high:{sign}.3f})"


def short(score: str) -> str:
    """Returns a short name of a score, without the prefix of one caption per image."""
    return score.removeprefix("single_caption/")


def said_chance(chance: float | None) -> str:
    """Returns the chance of a score as text, '' if it is not known."""
    return "" if chance is None else f", chance {chance:.3f}"


def cost(value: float | None, relative: float | None) -> str:
    """Returns a count with its ratio to the base, which is called equal within `EQUAL`."""
    if value is None:
        return "not said"
    if relative is None:
        return count(value)
    return f"{count(value)} ({'equal' if abs(relative - 1) <= EQUAL else f'x {relative:.2f}'})"


def count(value: float) -> str:
    """Formats a number with an SI prefix, such as 1.23 M or 45.6 T."""
    for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"


def as_csv(lines: Sequence[Line]) -> str:
    """Returns the unrounded numbers as CSV, with one line for each variant and score."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    fields = ("mean", "low", "high", "count")
    writer.writerow(
        ["score", "variant", *fields, *(f"difference_{f}" for f in fields), "verdict", "chance"]
        + ["parameters", "parameter_ratio", "flops", "flops_ratio"]
    )
    for each in lines:
        writer.writerow(
            [each.score, each.variant, *parts(each.value), *parts(each.difference), each.verdict]
            + [each.chance, each.parameters, each.parameter_ratio, each.flops, each.flops_ratio]
        )
    return content.getvalue()


def parts(value: Mean | None) -> list[Any]:
    """Returns mean, low, high and count for CSV, empty where they are not known."""
    if value is None:
        return [""] * 4
    ends = [value.low, value.high] if value.known else ["", ""]
    return [value.mean, *ends, value.count]
