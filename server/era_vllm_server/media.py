"""vLLM's media connector, chosen by ``VLLM_MEDIA_CONNECTOR``."""

from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from era_vllm_server.front import CONNECTOR


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class GuardedConnector(MediaConnector):
    """Fetches pictures."""
