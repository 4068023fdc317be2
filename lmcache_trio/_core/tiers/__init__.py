"""What is decided for a tier: when it may be used, what is loaded from it, and what is written to it."""
