"""Metrics, logs, reports, comparisons."""
