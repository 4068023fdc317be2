"""What the end-to-end tests with vLLM share, and the programs that run its engines."""
