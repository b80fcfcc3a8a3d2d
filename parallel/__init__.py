"""The layout, its process groups, and what shards and communicates."""
