"""The transport of calls: sockets, interceptors, bounds on messages, and the mapping of errors to statuses."""
