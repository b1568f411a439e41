"""The trainer of the small models. Read ``loop.py`` first, then ``qwen3_vl.py``."""
