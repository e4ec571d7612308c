"""One reader a file: `records(root, ...)` returns a sorted list of `asa.data.datasets.record.Record`."""
