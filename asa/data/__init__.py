"""Files to records to tensors: readers, preprocessing, the store, crops, the phantom cohort."""
