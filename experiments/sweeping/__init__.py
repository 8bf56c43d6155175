"""Sweeps of ablations: their definition, their runs, and the launchers of these."""
