"""What a search found: results, correlation, importance, the page."""
