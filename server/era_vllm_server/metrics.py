"""Our counters on vLLM's ``/metrics``, counted in the API servers; prometheus_client's own objects.

With several API servers prometheus_client sums them (its multiprocess mode, which vLLM sets up).
Leaves out what workers count (``era_vllm/vllm_plugin/metrics.py``).
"""

from typing import Final

from prometheus_client import Counter

TOKENS_BEFORE: Final = Counter(
    "era:image_tokens_before", "Image tokens that the vision encoder made.", ["policy", "level"]
)
TOKENS_AFTER: Final = Counter(
    "era:image_tokens_after", "Image tokens that the language model was given.", ["policy", "level"]
)
IMAGES: Final = Counter("era:images", "Images by what decided their pruning rate.", ["source"])
CLAMPED: Final = Counter("era:clamped_images", "Images whose detail was brought into bounds.")
REJECTED: Final = Counter("era:rejected_requests", "Requests refused by the front.", ["reason"])
