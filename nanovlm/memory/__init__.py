"""The memory of a training step: predicted from shapes alone, and measured."""
