"""A server with a fake device, its engines in messages, and a model of both."""
