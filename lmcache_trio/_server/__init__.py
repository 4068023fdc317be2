"""The Trio shell around the core: it waits, moves messages and ends what must end. Decisions are made in `_core`."""
