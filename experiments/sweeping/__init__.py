"""Ablations: what they ask, their runs, and what carries these out."""
