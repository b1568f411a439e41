"""Identity of a pruned image for every cache: the picture, its own rate, our settings.

Never its neighbours in the request, their order, or the way in which the rate was asked for; and
not the default rate, so that a default of .778 and a request for .778 share caches. Our version is
part of the settings, since a cache may outlive the process that filled it.

A KV store may be shared with other servers, and a block of text has another layout here than in a
stock engine (wider heads): so every prompt, of text alone too, is in a namespace of our own.
"""

from vllm.multimodal.hasher import MultiModalHasher

import era_vllm
from era_vllm.config import EraConfig


def namespace(config: EraConfig, salt: str | None = None) -> str:
    """Return a prompt's cache salt: ours, then the user's own.

    Source: vLLM's ``cache_salt``, part of the first block's hash and so of every prefix.
    """
    ours = f"era {era_vllm.__version__} {config.fingerprint()}"
    return ours if salt is None else f"{ours} {salt}"


def pruned_hashes(
    hashes: list[str], rates: list[float], config: EraConfig, algorithm: str
) -> list[str]:
    """Salt each image's hash with its effective rate and the settings' fingerprint."""
    settings = namespace(config)
    return [
        MultiModalHasher.hash_kwargs(algorithm, mm_hash=item, era_rate=rate, era_settings=settings)
        for item, rate in zip(hashes, rates, strict=True)
    ]
