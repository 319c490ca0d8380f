"""Plans inside serving engines: a plug-in for vLLM. Nothing here imports vLLM before vLLM itself loads the plug-in."""
