"""The trainer of the small models. Read ``loop.py`` first, then ``qwen3_vl.py``."""

from typing import Final

ARCHS: Final = ("qwen3_vl", "llava", "smol")
"""Architectures: a file of this folder each."""
