"""Serving an exported folder with vLLM, in an environment of its own."""
