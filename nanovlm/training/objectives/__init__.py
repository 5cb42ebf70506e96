"""The losses that a run can minimise: of answers, of pairs of them, of words."""
