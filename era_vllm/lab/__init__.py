"""What proves accuracy: a picture generator, small models trained on it, and a scorer.

Reading order: `synth/dataset.py` (pictures with questions and right answers), `asking.py` (what a
model answers), `scores.py` (what that is worth), `checkpoint/` (the model), `train/loop.py`
(the trainer), `samples/` (a dozen pictures).
Nothing here imports vllm, and importing this package imports nothing but the standard library.
"""

from pathlib import Path
from typing import Final

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
"""The folder of the shipped checkpoint, as `from_pretrained` and `vllm serve` take it."""
CHECKPOINT_QWEN3_VL: Final = Path(__file__).parent / "checkpoint_qwen3_vl"
"""The folder of a small Qwen3-VL: several pictures, videos."""
CHECKPOINT_SMOL: Final = Path(__file__).parent / "checkpoint_smol"
"""What `smol.py` makes a LLaVA on SmolLM2 with; no checkpoint by itself."""
