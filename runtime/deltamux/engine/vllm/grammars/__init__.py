"""Structured output: constraints are bounded, then compiled in a process of their own before the engine gets them."""
