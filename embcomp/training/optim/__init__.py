"""Optimizers, their decay, initial rows, precision."""
