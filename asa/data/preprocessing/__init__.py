"""Raw scans to the prepared store."""
