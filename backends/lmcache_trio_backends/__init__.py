"""The built-in backends. Nobody imports them: the server finds them by entry point, like any other plugin."""
