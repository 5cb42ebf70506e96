"""What a run writes down as it goes: metrics, sample answers, trackers, skipped records, bad steps."""
