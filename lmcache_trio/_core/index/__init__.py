"""What memory holds: chunks, their order of eviction, their readers and writers, and the requests that ask."""
