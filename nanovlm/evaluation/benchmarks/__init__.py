"""Published benchmarks, read and scored as published: POPE, MMBench and MMStar."""
