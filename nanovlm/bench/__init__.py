"""How fast and how large nanovlm is, next to transformers doing the same work: `python -m nanovlm.bench --weights DIR`."""
