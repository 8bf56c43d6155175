"""The folder of a run: its files, its checkpoints with checksums, its metrics."""
