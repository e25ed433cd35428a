"""What a run writes, checked before it is read."""
