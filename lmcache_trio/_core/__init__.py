"""Sans-I/O: decides and never waits. Nothing here knows a clock, a thread, a socket or a tensor."""
