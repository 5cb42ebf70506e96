"""What a training step needs in memory: predicted from shapes alone, and measured."""
