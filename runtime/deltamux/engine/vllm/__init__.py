"""The engine on vLLM, by the process that runs it; nothing outside this folder imports vLLM."""
