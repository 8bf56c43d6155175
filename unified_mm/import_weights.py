"""Makes a run from weights that were trained elsewhere.

    python -m unified_mm.import_weights --from DIR --out runs/clip
    python -m unified_mm.import_weights --from openai/clip-vit-base-patch32 --out runs/clip

DIR is what Hugging Face's `save_pretrained` writes: config.json, model.safetensors (or shards with
model.safetensors.index.json) and the tokenizer's files; or what open_clip writes. A name of the
Hugging Face Hub, as NAME or NAME@REVISION, is looked for in the Hub's cache on this machine
(HF_HUB_CACHE, HF_HOME), and fetched where huggingface_hub is installed (the extra `hub`); the run's
config keeps its revision. package:NAME/FOLDER is a folder of an installed package, and a folder may
hold one file of weights alone, such as efficientnet-lite0-57934424.pth.
`unified_mm.load("runs/clip")` loads the new run. Usable at once: CLIP and SigLIP for retrieval and
zero-shot classification, LLaVA and language models to write; the towers of AST, Whisper and
VideoMAE embed sounds and clips (`model.embed(files, of="audio")`). Tokenizer and preprocessing come
along.
--config.model.start_from.text=RUN (or .image, .audio, .video, .stem, .whole) trains on from a run;
by that of .reader contrast reads its texts.
"""

from __future__ import annotations

import argparse
import sys

from unified_mm.cli.command import command
from unified_mm.cli.messages import say
from unified_mm.files import refuse_existing
from unified_mm.inference.imported import Imported, import_directory, write_run
from unified_mm.pretrained.hub import directory_of
from unified_mm.runs.checkpoints import refuse_name
from unified_mm.runs.folder import RunFolder
from unified_mm.task import parameter_counts


@command("import_weights", __doc__, needs=("from", "out"))
def main(options: argparse.Namespace) -> int:
    """Imports the weights, writes the run, prints a summary and returns the exit code."""
    refuse_existing(RunFolder(options.out).path)
    refuse_name(RunFolder(options.out).path)
    imported = import_directory(directory_of(getattr(options, "from")))
    folder = write_run(imported, options.out)
    counts = parameter_counts(imported.params)
    say(f"family: {imported.family} (part: {imported.part})")
    say(f"parameters: {sum(counts.values()):,}")
    for part, count in counts.items():
        say(f"  {part} {count:,}")
    for reason, names in imported.ignored.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"passed over: {names[0]}{more} ({reason})")
    say(f"run: {folder.path}")
    return 0


__all__ = ["Imported", "import_directory", "main", "write_run"]

if __name__ == "__main__":
    main(sys.argv[1:])
