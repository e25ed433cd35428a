"""What makes the data that methods are given."""
