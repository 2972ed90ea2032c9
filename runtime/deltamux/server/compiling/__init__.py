"""Compilation of uploads to programs, in the one process that runs plugins."""
