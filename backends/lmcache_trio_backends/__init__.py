"""The backends that come with lmcache-trio, found by entry point like anyone's: nobody imports them by name."""
