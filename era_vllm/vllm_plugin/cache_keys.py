"""Identity of a pruned image for every cache: the picture, its own rate, our settings.

Never its neighbours in the request, their order, or the way in which the rate was asked for; and
not the default rate, so that a default of .778 and a request for .778 share caches.
"""

from vllm.multimodal.hasher import MultiModalHasher

from era_vllm.config import EraConfig


def pruned_hashes(
    hashes: list[str], rates: list[float], config: EraConfig, algorithm: str
) -> list[str]:
    """Salt each image's hash with its effective rate and the settings' fingerprint."""
    salt = config.fingerprint()
    return [
        MultiModalHasher.hash_kwargs(algorithm, mm_hash=item, era_rate=rate, era_settings=salt)
        for item, rate in zip(hashes, rates, strict=True)
    ]
