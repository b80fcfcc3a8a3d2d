"""Durable checkpoints: what is written, when it counts, and how it comes back under any layout."""
