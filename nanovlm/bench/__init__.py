"""The speed and memory of nanovlm next to transformers on the same work; see `__main__.py`."""
