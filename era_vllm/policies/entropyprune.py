"""EntropyPrune: the tokens whose queries are spread over most directions of the heads.

Source: arXiv:2602.17196. It prunes behind layer k of the language model by the queries of layer
k - 1 (from 0); here everything is pruned before layer 0, so that k = 1, the paper's for Qwen2.5-VL,
has the published scores at an earlier place. Deviations: docs/policies.md.
"""

from dataclasses import dataclass

from jaxtyping import Float32, Int
from torch import Tensor

from era_vllm.errors import ConfigError
from era_vllm.steps.bias import log_cluster_size
from era_vllm.steps.matrix_entropy import matrix_entropy
from era_vllm.steps.merge import Rest, with_rest
from era_vllm.steps.ranking import top
from era_vllm.steps.similarity import quantize
from era_vllm.types import Clusters, Signal, VisualTokens


@dataclass(frozen=True, slots=True)
class Policy:
    """The tokens of highest matrix entropy of the first layer's queries."""

    entropyprune_k: int = 1
    """Layer of the language model whose queries are read, from 1. Only the first: those of a later
    one depend on the tokens before, and would need that many layers to be run in the encoder."""
    trace_norm: bool = True
    """Divide each token's spectrum by its sum, as the paper says; its code does not."""
    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    def __post_init__(self) -> None:
        if self.entropyprune_k != 1:
            raise ConfigError(
                f"policy 'entropyprune' entropyprune_k: got {self.entropyprune_k}, allowed: 1; "
                "queries of a later layer need the layers before it to be run on the picture "
                "alone, which is not built"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        """Queries of the language model's first layer."""
        return frozenset({Signal.LANGUAGE_QUERIES})

    def select(self, tokens: VisualTokens, num_anchors: int) -> Int[Tensor, "s a"]:
        """Return the tokens of highest entropy."""
        queries = tokens.by_head(Signal.LANGUAGE_QUERIES)
        entropy = matrix_entropy(queries, trace_norm=self.trace_norm)
        return top(quantize(entropy.float()), num_anchors)

    def assign(self, tokens: VisualTokens, anchors: Int[Tensor, "s a"]) -> Clusters:
        """Drop the rest, or merge it."""
        return with_rest(tokens, anchors, self.rest)

    def log_bias(self, tokens: VisualTokens, clusters: Clusters) -> Float32[Tensor, "s a"]:
        """Return ln of the cluster size: 0 where nothing was merged."""
        return log_cluster_size(clusters)
