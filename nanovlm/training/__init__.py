"""The hand-written training loop and what it needs."""
