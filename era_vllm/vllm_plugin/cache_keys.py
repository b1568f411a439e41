"""Identity of a pruned item for every cache: its pixels, K of its segments, what is asked of it
where that counts (``EraConfig.question_aware``), our settings.

Never its neighbours in the request, their order, or the way in which the rate was asked for; and
not the rate, of which near ones keep the same. Our version is part of the settings, since a cache
may outlive the process that filled it, and so is the code that makes the numbers.

A KV store may be shared with other servers, and a block of text has another layout here than in a
stock engine (wider heads): so every prompt, of text alone too, is in a namespace of our own.
"""

from collections.abc import Sequence

from vllm.multimodal.hasher import MultiModalHasher

from era_vllm.config import EraConfig
from era_vllm.plan import Plan
from era_vllm.vllm_plugin.build import build
from era_vllm.vllm_plugin.families import Family


def namespace(config: EraConfig, family: Family, salt: str | None = None) -> str:
    """Return a prompt's cache salt: ours, then the user's own.

    Source: vLLM's ``cache_salt``, part of the first block's hash and so of every prefix.
    """
    ours = f"era {build(config.policy, family.target)} {config.fingerprint()}"
    return ours if salt is None else f"{ours} {salt}"


def pruned_hashes(
    hashes: Sequence[str],
    plans: Sequence[Plan],
    config: EraConfig,
    family: Family,
    algorithm: str,
    modality: str,
) -> list[str]:
    """Salt each item's hash with what its plan keeps and the settings' fingerprint."""
    settings = namespace(config, family)
    return [
        MultiModalHasher.hash_kwargs(
            algorithm,
            mm_hash=item,  # a client's own name of it, where it has given one
            era_shape=[modality, *one.layout.shape],
            era_num_anchors=list(one.num_anchors),
            era_settings=settings,
            **({"era_question": list(one.question)} if one.question else {}),
        )
        for item, one in zip(hashes, plans, strict=True)
    ]
