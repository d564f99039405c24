"""Data, one training run, comparisons of many, and their reports."""
