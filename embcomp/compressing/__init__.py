"""Trained tables made smaller: in a model in memory, and in files of any size."""
