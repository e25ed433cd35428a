"""Ranks: processes, placement, a watchdog, quiet libraries."""
