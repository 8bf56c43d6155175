"""Data for training: sources, manifests of records, and the pipeline that makes batches of them."""

from unified_mm.data.records import Manifest, Problem, Record, Stored, StoredImage, Text

__all__ = ["Manifest", "Problem", "Record", "Stored", "StoredImage", "Text"]
