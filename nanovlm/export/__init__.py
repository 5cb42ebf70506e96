"""`python -m nanovlm.export`: models as folders that other tools read."""
