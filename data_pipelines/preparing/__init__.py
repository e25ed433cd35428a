"""The passes of `prepare`: count, rank, encode, write."""
