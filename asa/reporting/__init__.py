"""HTML pages and figures from what evaluation returns."""
