"""The front end, in the server's process: prompts, outputs, and which programs the workers keep."""
