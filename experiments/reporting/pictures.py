"""Figures of an ablation: learning curves, scores against FLOPs, bars with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.reporting.kept import Result
from experiments.reporting.summary import Line, short
from unified_mm.analysis.figures import as_svg, subplots
from unified_mm.analysis.intervals import mean_interval
from unified_mm.analysis.scaling import PowerLaw


def learning_curves(results: Sequence[Result], names: Sequence[str]) -> str:
    """Draws the losses over training, one panel for each objective, as SVG.

    The total loss is drawn only if there is no other: its terms differ between variants.
    """
    found = dict.fromkeys(name for r in results for name in r.curves if name != "loss")
    metrics = list(found) or ["loss"]
    figure, panels = side_by_side(len(metrics))
    for axes, metric in zip(panels, metrics, strict=True):
        curves_of_metric(axes, results, names, metric)
    name_variants(figure, [line for axes in panels for line in axes.get_lines()], names)
    return as_svg(figure)


def curves_of_metric(
    axes: Any, results: Sequence[Result], names: Sequence[str], metric: str
) -> None:
    """Draws one line for each variant: the mean over its seeds, and their range."""
    for name in names:
        curves = [r.curves[metric] for r in results if r.variant == name and metric in r.curves]
        if not curves:
            continue
        length = min(len(curve) for curve in curves)
        steps = np.array([step for step, _ in curves[0][:length]], np.float64)
        values = np.array([[value for _, value in curve[:length]] for curve in curves])
        colour = colour_of(name, names)
        # No line over a phase that does not learn this.
        ways = np.diff(steps)
        usual = np.median(ways) if ways.size else 0.0
        gaps = np.flatnonzero(ways > 2 * usual) + 1
        steps = np.insert(steps, gaps, np.nan)
        values = np.insert(values, gaps, np.nan, axis=1)
        axes.plot(steps, values.mean(0), label=name, linewidth=1.2, color=colour)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel("training step")
    axes.set_ylabel(metric)


def bars(results: Sequence[Result], lines: Sequence[Line], names: Sequence[str]) -> str:
    """Draws the scores with intervals and chance, one panel for each score, as SVG."""
    scores = list(dict.fromkeys(line.score for line in lines))
    figure, panels = side_by_side(len(scores))
    for axes, score in zip(panels, scores, strict=True):
        bars_of_score(axes, results, [line for line in lines if line.score == score], names)
    return as_svg(figure)


def bars_of_score(
    axes: Any, results: Sequence[Result], lines: Sequence[Line], names: Sequence[str]
) -> None:
    """Draws a bar with its 95% interval for each variant, a dot for each seed, and chance."""
    shown = [(line, line.value) for line in lines if line.value is not None]
    for place, (line, value) in enumerate(shown):
        half = value.high - value.mean if value.known else None  # one seed has no interval
        colour = colour_of(line.variant, names)
        axes.bar(place, value.mean, yerr=half, capsize=4, color=colour, alpha=0.8)
        seeds = scores_of(results, line.variant, line.score)
        axes.plot([place] * len(seeds), seeds, "o", color="black", markersize=3, alpha=0.6)
        if line.chance is not None:
            axes.hlines(line.chance, place - 0.4, place + 0.4, colors="black", linestyles="dashed")
    axes.set_xticks(range(len(shown)), [line.variant for line, _ in shown], rotation=20, ha="right")
    axes.set_ylabel(short(lines[0].score))


def against_flops(
    results: Sequence[Result],
    names: Sequence[str],
    scores: Sequence[str],
    fitted: str,
    law: PowerLaw | None,
) -> str:
    """Draws scores against the FLOPs of training, one panel for each score, as SVG.

    The power law is drawn in the panel of the score `fitted`.
    """
    figure, panels = side_by_side(len(scores))
    for axes, score in zip(panels, scores, strict=True):
        score_against_flops(axes, results, names, score, law if score == fitted else None)
    name_variants(figure, [each for axes in panels for each in axes.containers], names)
    return as_svg(figure)


def score_against_flops(
    axes: Any, results: Sequence[Result], names: Sequence[str], score: str, law: PowerLaw | None
) -> None:
    """Draws a point with its 95% interval for each variant, and the power law through them."""
    from matplotlib import ticker

    cheapest, dearest = (limit(r.flops for r in results) for limit in (min, max))
    for name in names:
        seeds = scores_of(results, name, score)
        if not seeds:
            continue
        found = mean_interval(np.array(seeds))
        axes.errorbar(
            float(np.mean([r.flops for r in results if r.variant == name])),
            found.mean,
            yerr=found.high - found.mean if found.known else None,
            marker="o",
            capsize=4,
            label=name,
            color=colour_of(name, names),
        )
    if law is not None:
        cost = np.geomspace(cheapest, dearest, 50)
        label = f"FLOPs ^ -{law.exponent.value:.3g} + {law.floor.value:.3g}"
        axes.plot(cost, law(cost), color="black", linewidth=1, label=label)
        axes.set_yscale("log")
        axes.legend(handles=axes.get_lines()[-1:], fontsize="small")
    axes.set_xscale("log")
    axes.set_xlim(cheapest / 1.5, dearest * 1.5)  # equal ones are to look equal
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.EngFormatter())
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("FLOPs of training")
    axes.set_ylabel(short(score))


def name_variants(figure: Any, drawn: Sequence[Any], names: Sequence[str]) -> None:
    """Draws one legend of the variants above all panels."""
    by_name = {each.get_label(): each for each in drawn}
    ordered = [by_name[name] for name in names if name in by_name]
    figure.legend(handles=ordered, loc="outside upper center", ncols=6, fontsize="small")


def scores_of(results: Sequence[Result], variant: str, score: str) -> list[float]:
    """Returns a variant's score for each of its seeds that has it."""
    return [r.scores[score] for r in results if r.variant == variant and score in r.scores]


def colour_of(name: str, names: Sequence[str]) -> str:
    """Returns a variant's colour, the same in all figures, whichever variants have runs."""
    return f"C{names.index(name) % 10}"


def side_by_side(count: int) -> tuple[Any, list[Any]]:
    """Returns a figure and its panels."""
    return subplots(2 + 4 * count, 3.4, columns=count)
