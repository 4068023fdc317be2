"""Sans-I/O: the core decides and never waits. It knows no clock, thread, socket or tensor."""
