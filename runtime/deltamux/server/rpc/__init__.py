"""The gRPC services, and the translation of their messages."""
