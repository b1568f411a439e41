"""READ FIRST: prune a batch of segments = select, merge, log_bias, check.

Pure and batched: no loop over segments or tokens, no host synchronisation. What is left out: where
tokens come from (``models``), what a policy does (``policies``), where the bias goes
(``attention``).
"""

from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor

from era_vllm.contracts import PruningPolicy
from era_vllm.errors import PolicyError
from era_vllm.types import DEGENERATE_KINDS, Degenerate, PrunedTokens, VisualTokens


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
        policy: How to choose, merge and weigh.
        merge: False keeps each anchor's own embedding (pruned tokens still count in the bias).
        bias: False sets every log-bias to 0.

    Returns:
        PrunedTokens; with ``num_anchors >= n`` the input embeddings themselves and bias 0.

    Raises:
        PolicyError: no tokens at all, or a signal that the policy needs is missing.
    """
    n, device = tokens.n, tokens.embeds.device
    if n == 0:
        raise PolicyError("a segment has no visual tokens; got n = 0, needed n >= 1")
    if missing := policy.needs - tokens.signals:
        names = ", ".join(sorted(signal.value for signal in missing))
        raise PolicyError(f"policy {policy!r} needs {names}, which the tokens do not carry")
    counts = torch.zeros(DEGENERATE_KINDS, dtype=torch.int64, device=device)
    num_anchors = max(num_anchors, 1)
    if num_anchors >= n:
        counts[Degenerate.TOO_FEW_TOKENS] = tokens.segments if num_anchors > n else 0
        rows = torch.arange(n, device=device).expand(tokens.segments, n)
        zeros = torch.zeros(tokens.segments, n, dtype=torch.float32, device=device)
        return PrunedTokens(tokens.embeds, zeros, rows, rows, counts)
    tokens = _repaired(tokens, counts)
    anchors = policy.select(tokens, num_anchors)
    clusters = policy.merge(tokens, anchors)
    log_bias = policy.log_bias(tokens, clusters)
    if not bias:
        log_bias = torch.zeros_like(log_bias)
    if not merge:
        index = anchors[..., None].expand(-1, -1, tokens.embeds.shape[-1])
        clusters = replace(clusters, embeds=tokens.embeds.gather(1, index))
    return PrunedTokens(clusters.embeds, log_bias, anchors, clusters.assignment, counts)


def _repaired(tokens: VisualTokens, counts: Int[Tensor, "kinds"]) -> VisualTokens:
    """Finite embeddings and scores, finite attention >= 0; Mutates: counts. Source: METHODS 6."""
    embeds, attention, scores = tokens.embeds, tokens.attention, tokens.scores
    counts[Degenerate.NON_FINITE_EMBEDS] = (~embeds.isfinite()).sum()
    if attention is not None:
        counts[Degenerate.NON_FINITE_ATTENTION] = (~attention.isfinite()).sum()
        attention = attention.float().nan_to_num(0.0, 0.0, 0.0).clamp_min(0.0)
        counts[Degenerate.NO_ATTENTION] = (attention.sum(1) <= 0).sum()
    if scores is not None:
        counts[Degenerate.NON_FINITE_ATTENTION] += (~scores.isfinite()).sum()
        scores = scores.float().nan_to_num(0.0, 0.0, 0.0)
    return replace(tokens, embeds=embeds.nan_to_num(0.0), attention=attention, scores=scores)
