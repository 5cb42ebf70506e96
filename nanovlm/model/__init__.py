"""The model. Read `vlm.py` first; nothing here knows about training, files or command lines."""
