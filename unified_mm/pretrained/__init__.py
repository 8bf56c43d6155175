"""Weights of other projects, converted to ours and back by a table for each family."""
