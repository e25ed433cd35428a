"""Rows that somebody else chose: the map from ids to rows is data."""
