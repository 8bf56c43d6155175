"""Drawings for notebooks: each function takes named arrays and returns one `Drawing`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from unified_mm.analysis.figures import Drawing, as_svg, subplots
from unified_mm.analysis.intervals import Mean
from unified_mm.analysis.pages import LINE_COLOURS, Picture
from unified_mm.analysis.scaling import PowerLaw


def by_layer(values: Mapping[str, Float[np.ndarray, " L"]], what: str) -> Drawing:
    """Draws a line for each parameter over the layers of its stack; a single value is a dot."""
    from matplotlib import colormaps

    figure, (axes,) = subplots(8, 4, grid=0.2)
    axes.set_prop_cycle(color=colormaps["tab20"](np.arange(20)))
    for name, own in values.items():
        axes.plot(range(len(own)), own, marker="o", markersize=3, linewidth=1, label=name)
    axes.set(xlabel="layer", ylabel=what)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="xx-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return Drawing(as_svg(figure))


def spectra(values: Mapping[str, Float[np.ndarray, "L rank"]]) -> Drawing:
    """Draws singular values relative to the largest.

    There is a panel for each parameter, and a line for each layer.
    """
    figure, panels = _grid(len(values), 3)
    for axes, (name, own) in zip(panels, values.items()):
        for layer, each in enumerate(own):
            axes.semilogy(np.maximum(each / max(each[0], 1e-30), 1e-6), label=f"{layer}")
        axes.set_title(name, fontsize="xx-small")
    panels[0].legend(title="layer", fontsize="xx-small", title_fontsize="xx-small")
    return Drawing(as_svg(figure))


def heads(values: Mapping[str, Float[np.ndarray, "L H"]]) -> Drawing:
    """Draws shares in [0, 1]: a panel for each name, with layers as rows and heads as columns."""
    figure, panels = _grid(len(values), 3)
    for axes, (name, own) in zip(panels, values.items()):
        shown = axes.imshow(own, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer")
        axes.set(xticks=range(own.shape[1]), yticks=range(own.shape[0]))
        figure.colorbar(shown, ax=axes)
    return Drawing(as_svg(figure))


def maps_over(
    picture: Picture, names: Sequence[str], maps: Float[np.ndarray, "maps rows cols"]
) -> Drawing:
    """Draws a picture, and beside it the picture under each map, each on its own scale."""
    figure, panels = _grid(len(names) + 1, 6)
    height, width = picture.shape[:2]
    panels[0].imshow(picture)
    for axes, name, each in zip(panels[1:], names, maps):
        axes.imshow(picture, extent=(0, width, height, 0))
        axes.imshow(each, extent=(0, width, height, 0), alpha=0.6, cmap="inferno")
        axes.set_title(name, fontsize="small")
    for axes in panels:
        axes.set_axis_off()
    return Drawing(as_svg(figure))


def pictures(views: Sequence[Picture], titles: Sequence[str], columns: int = 4) -> Drawing:
    """Draws pictures in rows, each under its title."""
    figure, panels = _grid(len(views), columns)
    for axes, view, title in zip(panels, views, titles):
        axes.imshow(view)
        axes.set_title(textwrap.fill(title, 36), fontsize="xx-small")
    for axes in panels:
        axes.set_axis_off()
    return Drawing(as_svg(figure))


def plane(parts: Mapping[str, Float[np.ndarray, "n 2"]]) -> Drawing:
    """Draws points of several kinds on a plane, and a line between points of the same index."""
    figure, (axes,) = subplots(6, 5, grid=0.2)
    kinds = list(parts.values())
    for pair in zip(*kinds):
        axes.plot(*np.stack(pair).T, color="grey", linewidth=0.3, zorder=0)
    for colour, (name, points) in zip(LINE_COLOURS, parts.items()):
        axes.scatter(*points.T, s=6, color=colour, label=name)
    axes.legend()
    axes.set_aspect("equal")
    return Drawing(as_svg(figure))


def bars(values: Mapping[str, Mean], what: str) -> Drawing:
    """Draws means with their 95% intervals."""
    figure, (axes,) = subplots(7, 0.25 * len(values) + 1, grid=0.2)
    for place, each in enumerate(values.values()):
        # A value alone has no interval.
        low, high = (np.nan_to_num([each.mean - each.low, each.high - each.mean])).tolist()
        axes.barh(place, each.mean, color=LINE_COLOURS[0], alpha=0.7)
        axes.errorbar(each.mean, place, xerr=[[low], [high]], color="black", capsize=2)
    labels = [f"{name} ({each.count})" for name, each in values.items()]
    axes.set_yticks(range(len(values)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(what)
    return Drawing(as_svg(figure))


def law(
    fitted: PowerLaw, cost: Float[np.ndarray, " n"], loss: Float[np.ndarray, " n"], what: str
) -> Drawing:
    """Draws losses over cost, and the law fitted to them; both axes are logarithmic."""
    figure, (axes,) = subplots(6, 4, grid=0.2)
    smooth = np.geomspace(cost.min(), cost.max(), 100)
    axes.loglog(smooth, fitted(smooth), color=LINE_COLOURS[0])
    axes.loglog(cost, loss, "o", color=LINE_COLOURS[1])
    axes.set(xlabel=what, ylabel="loss, nats a token")
    return Drawing(as_svg(figure))


def _grid(count: int, columns: int) -> tuple[Any, list[Any]]:
    """Returns a figure with `count` panels, in rows of at most `columns`."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure, found = subplots(10, 10 * rows / columns * 0.8, rows, columns, grid=0.0)
    for unused in found[count:]:
        figure.delaxes(unused)
    return figure, found[:count]
