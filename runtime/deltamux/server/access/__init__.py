"""Access control: authentication, permissions of callers, and limits of concurrent work."""
