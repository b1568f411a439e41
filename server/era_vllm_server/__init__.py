"""Additions to vLLM's own OpenAI server, never a second one. READ FIRST: ``app``."""
