"""Chunks in memory: their order of eviction, their readers and writers, and the sessions that ask for them."""
