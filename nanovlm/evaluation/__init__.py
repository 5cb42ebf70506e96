"""Is it any good, and does it look? Metrics, and controls that take the image away."""
