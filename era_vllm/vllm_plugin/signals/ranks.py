"""What the ranks of tensor parallelism know together, each of which holds as many heads."""

from jaxtyping import Float, Float32
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)


def mean_over_ranks(of_heads: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Return the mean over ranks of what is a mean over each one's heads."""
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return of_heads
    gathered = tensor_model_parallel_all_gather(of_heads.contiguous(), dim=0)
    return gathered.unflatten(0, (ranks, -1)).mean(0)


def all_heads(of_rank: Float[Tensor, "*first h dh"]) -> Float[Tensor, "*first hq dh"]:
    """Return all ranks' heads, in their order."""
    if get_tensor_model_parallel_world_size() == 1:
        return of_rank
    return tensor_model_parallel_all_gather(of_rank.contiguous(), dim=of_rank.dim() - 2)
