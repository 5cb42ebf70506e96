"""From files and words to what the model takes: images, conversations, batches."""
