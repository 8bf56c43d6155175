"""A run is a folder: its files, its checkpoints with checksums, its metrics."""
