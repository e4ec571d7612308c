"""Files to records to tensors: readers, preparation, the store, the phantom cohort."""
