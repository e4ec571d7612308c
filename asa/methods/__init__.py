"""Methods: what is learned from a batch. A method owns its model and its losses."""
