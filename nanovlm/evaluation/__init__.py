"""Metrics for a model's answers, and controls that take the image away."""
