"""CAFE: rows of their own for hot ids, found in training by a sketch."""
