"""Pieces that methods route and combine with."""
