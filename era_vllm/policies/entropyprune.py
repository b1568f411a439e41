"""EntropyPrune: the tokens whose queries are spread over most directions of the heads.

Source: arXiv:2602.17196. It prunes behind layer k of the language model by the queries of layer
k - 1 (from 0); here everything is pruned before layer 0 by the same scores: those of layer 0 need
nothing before them, those of a later one the layers below it, run on the picture alone
(docs/scout.md). Deviations: docs/policies.md.
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
    """The tokens of highest matrix entropy of a layer's queries."""

    entropyprune_k: int = 1
    """Layer of the language model whose queries are read, >= 1: k - 1 layers and the queries of the
    next are run on each picture alone. Source: 2 for LLaVA-1.5, 1 for Qwen2.5-VL in the paper;
    ours is 1, which costs no layer."""
    trace_norm: bool = True
    """Divide each token's spectrum by its sum, as the paper says; its code does not."""
    rest: Rest = "dropped"
    """Pruned tokens are dropped as published, or merged into the nearest anchor with a log-size
    bias."""

    def __post_init__(self) -> None:
        if self.entropyprune_k < 1:
            raise ConfigError(
                f"policy 'entropyprune' entropyprune_k: got {self.entropyprune_k}, allowed: 1 up "
                "to the language model's layers; era-vllm ecl shows where entropy collapses"
            )

    @property
    def needs(self) -> frozenset[Signal]:
        """Queries of the language model."""
        return frozenset({Signal.LANGUAGE_QUERIES})

    @property
    def query_layer(self) -> int:
        """The layer whose queries they are."""
        return self.entropyprune_k

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
