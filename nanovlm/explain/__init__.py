"""Which patches of an image each word of an answer came from."""
