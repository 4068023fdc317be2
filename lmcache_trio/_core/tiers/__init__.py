"""The decisions for a tier: when it may be used, and which chunks are loaded from it and written to it."""
