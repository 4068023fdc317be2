"""Sans-I/O: the messages of the protocol, their encoding, and which may follow which."""
