"""Files: NIfTI, 2-D images, tables, and parallel processes."""
