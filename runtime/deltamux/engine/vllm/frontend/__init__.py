"""The server's process: the engine as the server sees it, prompts, outputs, and which programs the workers keep."""
