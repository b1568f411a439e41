"""Keeps what a worker pruned for somebody who watches for one image (``/v1/era/inspect``).

One of a model's ``listeners`` while somebody watches, and none otherwise. An image is known by the
hash of its pixels and its number of anchors: the model sees no request ids. So a neighbour with the
same picture at the same rate may be caught in its place, and is the same thing. Bounded in number
and time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final, NamedTuple

from jaxtyping import Float32
from torch import Tensor

from era_vllm.contracts import PruningPolicy
from era_vllm.policies import era
from era_vllm.steps.entropy import head_entropy, head_profile, unattended
from era_vllm.types import PrunedTokens, VisualTokens

_MOST: Final = 8
"""Images watched for at once: one an API server is usual."""


class Watched(NamedTuple):
    """Names an image."""

    pixel_hash: int
    num_anchors: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was pruned of one image, in plain values."""

    grid: tuple[int, int]
    anchors: list[int]
    assignment: list[int]
    log_bias: list[float]
    entropy: list[float] | None
    """Head entropy of each visual token, [0, 1]; None where the policy reads no attention."""


class Inspector:
    """Catches watched images while they are pruned."""

    def __init__(
        self,
        policy: PruningPolicy,
        listeners: list[Callable[[VisualTokens, PrunedTokens], None]],
    ) -> None:
        """Keep out of the list until the first watch.

        Args:
            listeners: The model's, which this joins while it watches.
        """
        self._policy = policy
        self._listeners = listeners
        self._until: dict[Watched, float] = {}
        self._found: dict[Watched, Found] = {}

    def watch(self, image: Watched, seconds: float) -> None:
        """Catch an image that is pruned within so many seconds; forgets the oldest of too many."""
        self._drop_late()
        self._until[image] = monotonic() + seconds
        while len(self._until) > _MOST:
            self._forget(next(iter(self._until)))
        if self not in self._listeners:
            self._listeners.append(self)

    def take(self, image: Watched) -> Found | None:
        """Return what was caught, and forget it; None = it was not pruned since."""
        found = self._found.get(image)
        self._forget(image)
        return found

    def __call__(self, tokens: VisualTokens, result: PrunedTokens) -> None:
        """Look at one pass of the reducer; waits for the device."""
        self._drop_late()
        if not self._until or tokens.seeds is None:
            return
        count = result.anchors.shape[1]
        for row, pixel_hash in enumerate(tokens.seeds.tolist()):
            image = Watched(pixel_hash, count)
            if image in self._until:
                self._found[image] = self._row(tokens, result, row)

    def _row(self, tokens: VisualTokens, result: PrunedTokens, row: int) -> Found:
        entropy = token_entropy(self._policy, tokens)
        return Found(
            tokens.grid,
            result.anchors[row].tolist(),
            result.assignment[row].tolist(),
            result.log_bias[row].tolist(),
            None if entropy is None else entropy[row].nan_to_num(1.0).tolist(),
        )

    def _drop_late(self) -> None:
        now = monotonic()
        for image in [image for image, until in self._until.items() if until < now]:
            self._forget(image)

    def _forget(self, image: Watched) -> None:
        self._until.pop(image, None)
        self._found.pop(image, None)
        if not self._until and self in self._listeners:
            self._listeners.remove(self)


def token_entropy(policy: PruningPolicy, tokens: VisualTokens) -> Float32[Tensor, "s n"] | None:
    """Return each token's head entropy as the policy sees it; None where it reads none."""
    if not isinstance(policy, era.Policy) or tokens.attention is None:
        return None
    profile = head_profile(tokens, policy.saliency, policy.temperature)
    return head_entropy(profile, unattended(tokens, policy.mass_guard))
