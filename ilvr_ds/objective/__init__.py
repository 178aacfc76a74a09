"""Losses as sums over known global counts. Knows nothing of parallelism."""
