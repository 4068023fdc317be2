"""The Trio shell around the core: it waits, sends and receives messages, and starts and ends tasks. `_core` decides."""
