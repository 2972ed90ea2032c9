"""Programs that try the whole server by force, for longer than a test may take."""
