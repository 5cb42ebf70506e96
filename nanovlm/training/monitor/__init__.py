"""What is written down during a run: log, samples, tracking, skipped records, bad steps, FLOPs."""
