"""Where variants run: local processes from a preloaded fork server."""
