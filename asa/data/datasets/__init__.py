"""One reader a file: `records(root, ...)` returns a list of `asa.data.datasets.record.Record`, sorted by id.

Every reader raises a FileNotFoundError if there is no such folder, and a ValueError if nothing is found in it.
"""
