"""Look-ups of all features of a collection in one call of compiled code."""
