"""Rows of 8 or 16 bits a weight while they are trained: `int8`, `int16`, `alpt`."""
