"""Making, converting and checking data."""
