"""The picture of the idea: which token sees which, and in which module, under each fusion.

    python -m experiments.draw_fusions

Writes `experiments/results/fusions.svg`. Who sees whom is asked of the attention rules themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from experiments.reporting.kept import RESULTS
from unified_mm.files import write_atomically
from unified_mm.nn.attention.rules import RULES
from unified_mm.nn.tokens import Group

# Name, modality, length and rule of each run of tokens of an example, in their order.
IMAGE = ("image", "image", 4, "separate")
CONTRAST = ("contrast", "text", 4, "separate")
CAPTION = ("captioning", "text", 4, "prefix")
# Fusion -> its groups, and the module that computes what an image and a text, each by itself, and
# a text of an image see.
FUSIONS = {
    "early": ((IMAGE, CONTRAST, CAPTION), ("one transformer",) * 3),
    "gated_cross_attention": (
        (IMAGE, CONTRAST, CAPTION),
        ("image tower", "text model", "gated layers"),
    ),
    "late": ((IMAGE, CONTRAST), ("image tower", "text model", "")),
}
COLOURS = {
    "one transformer": "#7a5195",
    "image tower": "#2f7fbf",
    "text model": "#e08e2b",
    "gated layers": "#3c9d5d",
}
TOKENS = {"image": COLOURS["image tower"], "text": COLOURS["text model"]}
UNSEEN = "#ececec"
CELL = 18  # pixels from one token to the next
WIDTH, HEIGHT = 390, 325  # of a panel


def main() -> None:
    target = RESULTS / "fusions.svg"
    write_atomically(target, draw().encode())
    print(target)


def pairs(fusion: str) -> Iterator[tuple[int, int, str]]:
    """Yields each query that sees a key, by their places in the sequence, with the module."""
    groups, (image, text, both) = FUSIONS[fusion]
    starts = np.cumsum([0, *(length for _, _, length, _ in groups)])
    for (name, modality, length, rule), first in zip(groups, starts, strict=False):
        for (other, seen, width, _), start in zip(groups, starts, strict=False):
            if modality == seen == "text" and name != other:
                continue  # texts of one pass never see one another
            found, _ = RULES[rule].between(
                Group(name, modality, length),
                Group(other, seen, width),
                (modality == "text", seen == "text"),
            )
            mask = found.in_order(np.arange(length)[:, None], np.arange(width)[None])
            module = both if modality != seen else image if seen == "image" else text
            for query, key in zip(*np.nonzero(mask if mask is not None else []), strict=True):
                yield int(first + query), int(start + key), module


def draw() -> str:
    """Draws the fusions side by side, as SVG."""
    width, height = WIDTH * len(FUSIONS), HEIGHT + 40
    parts = [f'<rect width="{width}" height="{height}" fill="white"/>']
    for number, fusion in enumerate(FUSIONS):
        inside = "".join(panel(fusion))
        parts.append(f'<g transform="translate({number * WIDTH + 160},90)">{inside}</g>')
    for number, (name, colour) in enumerate(COLOURS.items()):
        x, y = width // 2 - 470 + 240 * number, HEIGHT + 12
        parts += [square(x, y, colour), words(x + 24, y + 13, f"seen in the {name}", "start")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="13">{"".join(parts)}</svg>\n'
    )


def panel(fusion: str) -> Iterator[str]:
    """Yields the elements of one fusion: its tokens down and across, a cell for each two."""
    groups, _ = FUSIONS[fusion]
    total = sum(length for _, _, length, _ in groups)
    modules = {(query, key): module for query, key, module in pairs(fusion)}
    yield words(total * CELL // 2, -64, fusion, "middle", "bold")
    yield words(-28, -10, "queries \u2193  keys \u2192", "end")
    for query in range(total):
        for key in range(total):
            module = modules.get((query, key))
            yield square(key * CELL, query * CELL, COLOURS[module] if module else UNSEEN)
    start = 0
    for name, modality, length, _ in groups:
        for token in range(start, start + length):
            at = token * CELL + CELL // 2
            for x, y in ((at, -14), (-14, at)):
                yield f'<circle cx="{x}" cy="{y}" r="7" fill="{TOKENS[modality]}"/>'
        middle = start * CELL + length * CELL // 2
        yield words(middle, -30, name, "middle")
        yield words(-28, middle + 4, f"text for {name}" if modality == "text" else name, "end")
        start += length


def square(x: float, y: float, colour: str) -> str:
    side = CELL - 2
    return f'<rect x="{x + 1}" y="{y + 1}" width="{side}" height="{side}" fill="{colour}"/>'


def words(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}" fill="#222">'
        f"{text}</text>"
    )


if __name__ == "__main__":
    main()
