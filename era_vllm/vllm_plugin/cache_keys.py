"""Identity of a pruned image for every cache: the picture, its own rate, our settings.

Never its neighbours in the request, their order, or the way in which the rate was asked for; and
not the default rate, so that a default of .778 and a request for .778 share caches. Our version is
part of the settings, since a cache may outlive the process that filled it.
"""

from vllm.multimodal.hasher import MultiModalHasher

import era_vllm
from era_vllm.config import EraConfig


def pruned_hashes(
    hashes: list[str], rates: list[float], config: EraConfig, algorithm: str
) -> list[str]:
    """Salt each image's hash with its effective rate and the settings' fingerprint."""
    salt = f"{era_vllm.__version__} {config.fingerprint()}"
    return [
        MultiModalHasher.hash_kwargs(algorithm, mm_hash=item, era_rate=rate, era_settings=salt)
        for item, rate in zip(hashes, rates, strict=True)
    ]
