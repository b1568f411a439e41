"""Questions to the workers (``era_vllm/vllm_plugin/worker.py``), over vLLM's own RPC."""

from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.utils.import_utils import resolve_obj_by_qualname

from era_vllm.vllm_plugin.worker import EraWorker


def answer(engine: EngineClient) -> bool:
    """Whether the workers know our questions.

    They do not in a stock engine, nor where a user's own ``--worker-extension-cls`` took the place
    of ours; one that inherits from ``EraWorker`` is fine.
    """
    name = engine.vllm_config.parallel_config.worker_extension_cls
    return bool(name) and issubclass(resolve_obj_by_qualname(name), EraWorker)


async def call_workers(engine: EngineClient, method: str, *arguments: object) -> list[list[Any]]:
    """Return what every worker answers: [engine][rank].

    They answer between two steps. ``EngineClient.collective_rpc`` would do, but drops the answers
    of all engines but the first where there are several (data parallel).

    Args:
        engine: The API server's client.
        method: Of ``EraWorker``, or of any worker.
        arguments: Plain values.

    Raises:
        EngineDeadError: there is no engine any more.
    """
    return await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, arguments, None
    )
