"""Uploads become programs in a process of their own, the only one that runs plugins."""
