"""What takes a lesson more than a minute: `record()` of each module (`record.py`)."""
