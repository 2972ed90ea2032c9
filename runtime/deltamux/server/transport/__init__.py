"""How calls come in: sockets, interceptors, bounds on messages, and the errors that callers get."""
