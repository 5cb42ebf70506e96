"""How fast and how large nanovlm is, next to transformers doing the same work; see `__main__.py`."""
