"""What is trained on: sources, manifests of records, the pipeline that makes batches of them."""

from unified_mm.data.records import Manifest, Problem, Record, StoredImage, Text

__all__ = ["Manifest", "Problem", "Record", "StoredImage", "Text"]
