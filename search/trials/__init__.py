"""The queue of trials, its workers and its storage."""
