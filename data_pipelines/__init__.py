"""From raw logs to training batches: importers, `prepare`, the loader, generated logs."""
