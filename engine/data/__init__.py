"""Token shards, the order of samples, and objectives."""
