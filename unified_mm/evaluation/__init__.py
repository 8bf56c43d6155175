"""Scores of a trained model on a split, under the fixed names of the result table."""
