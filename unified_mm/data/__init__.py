"""Data: from a folder of images and texts to batches of arrays, by modality, with presence."""
