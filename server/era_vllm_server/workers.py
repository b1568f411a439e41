"""Questions to the workers (``era_vllm/vllm_plugin/worker.py``), over vLLM's own RPC."""

from typing import Any

from vllm.engine.protocol import EngineClient


async def ask_workers(engine: EngineClient, method: str, *arguments: object) -> list[list[Any]]:
    """Return what every worker answers: [engine][rank].

    They answer between two steps. ``EngineClient.collective_rpc`` would do, but drops the answers
    of all engines but the first where there are several (data parallel).

    Args:
        engine: The API server's client.
        method: Of ``EraWorker``.
        arguments: Plain values.

    Raises:
        EngineDeadError: there is no engine any more.
    """
    return await engine.engine_core.call_utility_all_async(
        "collective_rpc", method, None, arguments, None
    )
