"""Client processes that tests of faults kill, stop and continue."""
