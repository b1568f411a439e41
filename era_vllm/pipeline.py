"""READ FIRST: prune a batch of segments = select, assign, weigh, average, check.

Pure and batched: no loop over segments or tokens, no host synchronisation. What is left out: where
tokens come from (``models``), what a policy does (``policies``), where the bias goes
(``attention``).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from era_vllm.contracts import PruningPolicy
from era_vllm.errors import PolicyError
from era_vllm.steps.merge import average
from era_vllm.steps.validity import repaired, valid_anchors, valid_bias, valid_clusters
from era_vllm.types import DEGENERATE_KINDS, Clusters, Degenerate, PrunedTokens, VisualTokens


def prune(
    tokens: VisualTokens,
    num_anchors: int,
    policy: PruningPolicy,
    *,
    merge: bool = True,
    bias: bool = True,
) -> PrunedTokens:
    """Reduce every segment to ``num_anchors`` tokens.

    Args:
        tokens: Segments of equal length n.
        num_anchors: Tokens to keep a segment; clamped to [1, n].
        policy: How to choose, assign and weigh.
        merge: False keeps each anchor's own embedding (pruned tokens still count in the bias).
        bias: False sets every log-bias to 0.

    Returns:
        PrunedTokens; with ``num_anchors >= n`` the input embeddings themselves and bias 0. A
        step of the policy that returned what none may for a segment is replaced there by a plain
        one (evenly spaced anchors, nothing merged, bias 0) and counted; others do not notice.

    Raises:
        PolicyError: no tokens at all, or a signal that the policy needs is missing.
    """
    n, device = tokens.n, tokens.embeds.device
    if n == 0:
        raise PolicyError("a segment has no visual tokens; got n = 0, needed n >= 1")
    if missing := policy.needs - tokens.signals.keys():
        names = ", ".join(sorted(signal.value for signal in missing))
        raise PolicyError(f"policy {policy!r} needs {names}, which the tokens do not carry")
    counts = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64, device=device)
    count = max(num_anchors, 1)
    if count >= n:
        counts[Degenerate.TOO_FEW_TOKENS] = tokens.segments if num_anchors > n else 0
        rows = torch.arange(n, device=device).expand(tokens.segments, n)
        zeros = torch.zeros(tokens.segments, n, dtype=torch.float32, device=device)
        return PrunedTokens(tokens.embeds, zeros, rows, rows, counts, tokens.riders)
    tokens = repaired(tokens, counts)
    seen = tokens.compared
    anchors = valid_anchors(policy.select(seen, count), tokens, count, counts)
    clusters = valid_clusters(policy.assign(seen, anchors), anchors, n, counts)
    log_bias = valid_bias(policy.log_bias(seen, clusters), anchors, counts)
    embeds = _retained(tokens.embeds, clusters, merge=merge)
    riders = None if tokens.riders is None else _retained(tokens.riders, clusters, merge=merge)
    log_bias = log_bias if bias else torch.zeros_like(log_bias)
    return PrunedTokens(embeds, log_bias, anchors, clusters.assignment, counts, riders)


def _retained(
    rows: Float[Tensor, "s n c"], clusters: Clusters, *, merge: bool
) -> Float[Tensor, "s a c"]:
    if merge:
        return average(rows, clusters)
    return rows.gather(1, clusters.anchors[..., None].expand(-1, -1, rows.shape[-1]))
