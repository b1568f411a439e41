"""Names that several processes go by: of flags' values, classes, and fields of a prompt."""

from typing import Final

PLUGIN: Final = "era"
"""Our entry point, as in ``VLLM_PLUGINS``."""
PREFIX: Final = "Era"
"""Before an architecture's name: ours."""
TOKENIZER_MODE: Final = "era"
"""Value of ``--tokenizer-mode`` that selects our renderer."""
SCHEDULER: Final = "era_vllm.vllm_plugin.scheduler.EraScheduler"
"""``scheduler_cls``."""
WORKER: Final = "era_vllm.vllm_plugin.worker.EraWorker"
"""``worker_extension_cls``."""
RATES: Final = "era"
"""Key of a prompt's ``mm_processor_kwargs``: its items' pruning rates."""
