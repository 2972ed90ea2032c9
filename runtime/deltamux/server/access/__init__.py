"""Who may do what, and how much at once: keys, tenants of a call, pins, limits of concurrency."""
