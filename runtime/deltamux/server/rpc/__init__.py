"""The gRPC services, and how their messages become calls."""
