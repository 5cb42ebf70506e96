"""Records on disk → batches for the model."""
