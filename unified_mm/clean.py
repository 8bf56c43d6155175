"""Finds what had better not be trained on, and writes which examples these are, and why.

    python -m unified_mm.clean --config=photographs --config.data.dir=FOLDER --out=DIR
    python -m unified_mm.clean ... --filter=copies,threshold=20 --filter=blank
    python -m unified_mm.clean ... --filter=copies --filter=alike,run=RUN,threshold=0.05
    python -m unified_mm.clean ... --filter=mismatched,run=RUN,threshold=0.1

Stopped, the same command goes on: what was looked at is kept in the data's cache. Nothing is
deleted or copied: --config.data.manifest=DIR/manifest.json leaves the examples out of
training. DIR/report.html shows what was found, and how near the thresholds it is. Filters: copies
(also mirrored ones, and those of what is scored on; sounds, clips and shapes by their bytes),
blank, small, narrow, terse. On request: repeated (captions that many have), script (letters of
another script than most), those that ask a run, alike (by its embeddings; of=audio, say, for
sounds) and mismatched (the share of pictures that captions fit worst); or package.module:NAME.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.cli.recipes import resolve
from unified_mm.config import Config
from unified_mm.files import new_folder, refuse_existing, write_atomically

SHOWN = 30  # pairs nearest the threshold
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of a threshold, that counts are told at


@command("clean", __doc__, needs=("out",), takes=("config", "filter"), recipe="coco")
def main(options: argparse.Namespace) -> int:
    """Looks at all splits, writes manifest and report, and returns the exit code."""
    from unified_mm.data.cleaning import (
        FILTERS,
        look_at,
        of_sound_ones,
        read_filter,
        write_manifest,
    )
    from unified_mm.data.manifest import summary
    from unified_mm.data.sources import cache_folder, open_source

    named = [read_filter(each) for each in options.filter or FILTERS]
    filters = dict(named)
    if len(filters) < len(named):
        raise ValueError(f"--filter: each once, not {', '.join(name for name, _ in named)}")
    out = Path(options.out)
    refuse_existing(out)
    config = Config(resolve(options.recipe, say).to_dict())
    source, split = open_source(config.data), config.data.train_split
    if unread := config.unread(list(options.recipe.overrides)):
        raise ValueError(f"{', '.join(unread)}: set on the command line, but nothing reads it here")
    if split not in (splits := source.splits()):
        raise ValueError(f"data.train_split={split!r}: there are {', '.join(splits)}")
    manifests = {name: source.manifest(name) for name in splits}
    for each in manifests.values():
        say(summary(each))  # what cannot be read is left out already, and named
    pictures = look_at(manifests, split, cache_folder(config.data))
    found = of_sound_ones({name: (each, list(each(pictures))) for name, each in filters.items()})
    with new_folder(out) as half:
        dropped = write_manifest(half / "manifest.json", pictures, found, manifests[split])
        page = report(pictures, found, len(dropped))
        write_atomically(half / "report.html", page.encode())
    for name in filters:
        say(f"{name}: {sum(each == name for each, _ in dropped.values()):,} dropped")
    say(f"{len(dropped):,} of {len(manifests[split].records):,}: {out / 'manifest.json'}")
    return 0


def report(pictures: Any, found: Any, dropped: int) -> str:
    """Returns the page: for each filter its counts, and the cases nearest its threshold."""
    from unified_mm.analysis.pages import render_page

    sections = []
    for name, (each, cases) in found.items():
        nearest = sorted(cases, key=lambda case: abs(case.measure - each.threshold))[:SHOWN]
        counts = {
            factor * each.threshold: len(
                {case.place for case in cases if case.measure <= factor * each.threshold}
            )
            for factor in FACTORS
        }
        rows = [
            {
                "name": pictures.named(case.place),
                "reason": pictures.told(case),
                "measure": case.measure,
                "gone": case.measure <= each.threshold,
                "pictures": [
                    pictures.small[i]
                    for i in (case.place, case.other)
                    if i >= 0 and pictures.sizes[i].all()
                ],
            }
            for case in nearest
        ]
        sections.append({"name": name, "filter": repr(each), "counts": counts, "rows": rows})
    shown = {"sections": sections, "dropped": dropped, "all": int(pictures.trained.sum())}
    return render_page("cleaning.html.jinja", **shown)


if __name__ == "__main__":
    main(sys.argv[1:])
