"""Weights of other projects: a table for each family, and a driver that walks it both ways."""
