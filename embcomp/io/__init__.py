"""Files and texts: YAML, JSON, atomic writes."""
