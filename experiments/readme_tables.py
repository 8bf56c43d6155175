"""Tables in RESULTS.md, written from stored results: `python -m experiments.readme_tables`.

A table stands between `<!-- table: FILE[:SIZE] [NAME] -->` and `<!-- end of table -->`: FILE of
experiments/ablations, and the name of its results under experiments/results if that is another
one. With `--check` nothing is written, and a stale table is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import jax

from experiments.report import law_in_words, law_of
from experiments.reporting.kept import RESULTS, read_kept
from experiments.reporting.summary import brief, summarise
from experiments.sweeping.ablation import load_ablation
from unified_mm.cli.messages import exit_code, say
from unified_mm.files import naming, write_atomically

PAGE = Path(__file__).with_name("RESULTS.md")
ABLATIONS = Path(__file__).parent / "ablations"
BLOCK = re.compile(r"(<!-- table: ([^>]+) -->\n)(.*?)(<!-- end of table -->)", re.DOTALL)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    parser.add_argument("--page", "--readme", type=Path, default=PAGE, help="holds the tables")
    args = parser.parse_args()
    sys.exit(exit_code(lambda: update(args.page, check=args.check)))


def update(page: Path, *, check: bool) -> int:
    """Rewrites the tables, or with `check` only prints which are stale and returns 1 if any is."""
    with naming(f"--page={page}"):
        before = page.read_text(encoding="utf-8")
    after = rewritten(before)
    old, new = (BLOCK.findall(text) for text in (before, after))
    stale = [was[1] for was, now in zip(old, new, strict=True) if was != now]
    if check and stale:
        say(f"stale: {', '.join(stale)}; python -m experiments.readme_tables writes them anew")
        return 1
    if stale:
        write_atomically(page, after.encode())
    say(f"{len(old)} tables, {len(stale)} {'stale' if check else 'written anew'}")
    return 0


def rewritten(text: str, results: Path = RESULTS) -> str:
    """Returns the text with every table as the stored results have it now.

    Raises:
      ValueError: if a table does not end, or a marker is malformed.
      FileNotFoundError: if an ablation, or its stored results, do not exist.
    """
    if len(re.findall(r"<!--\s*table\b", text)) != len(BLOCK.findall(text)):
        raise ValueError(
            "a table begins with a line <!-- table: FILE --> and ends with <!-- end of table -->: "
            "there is one that does not"
        )
    return BLOCK.sub(lambda m: f"{m[1]}{table_of(m[2], results)}{m[4]}", text)


def table_of(said: str, results: Path) -> str:
    """Returns the table that a marker names.

    Args:
      said: the marker's text, FILE[:SIZE], and NAME if it is not the ablation's.
      results: the folder of all stored results.
    """
    given, _, other = said.partition(" ")
    name, ablation = load_ablation(f"{ABLATIONS / given}")
    found = read_kept(results / (other or name), ablation)
    return brief(summarise(ablation, found)) + law_in_words(
        ablation.power_law, law_of(ablation, found)
    )


if __name__ == "__main__":
    main()
