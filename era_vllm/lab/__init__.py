"""What proves accuracy: a picture generator, a small model trained on it, and a scorer.

Reading order: `synth/dataset.py` (pictures with questions and right answers), `asking.py` (what a
model answers), `accuracy.py` (how often it is right), `checkpoint/` (the model), `samples/` (a
dozen pictures).
Nothing here imports vllm, and importing this package imports nothing but the standard library.
"""

from pathlib import Path
from typing import Final

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
"""The folder of the shipped checkpoint, as `from_pretrained` and `vllm serve` take it."""
