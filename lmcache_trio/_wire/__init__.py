"""Sans-I/O: the sentences of the protocol, their encoding, and what may follow what."""
