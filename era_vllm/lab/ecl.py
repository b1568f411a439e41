"""Matrix entropy of visual tokens, layer by layer, and the layer where it collapses.

H = - sum of lambda ln lambda over the eigenvalues of the tokens' covariance, divided by its trace:
how many directions the tokens of a picture spread over. EntropyPrune prunes where it falls sharply,
the Entropy Collapse Layer (ECL).

Source: EntropyPrune (arXiv 2602.17196) for entropy and ECL; its rule for "sharply" is not stated,
ours is ``collapse``: reconstructed. Leaves out the command (``cli/ecl.py``).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from era_vllm.lab.oracle import LanguageOracle, Segment
from era_vllm.lab.scout import listen

SHARP: Final = 0.05
"""Share of the entropy that has to go for a fall to be a collapse."""


def matrix_entropy(tokens: Float[Tensor, "n d"]) -> float:
    """Return the entropy of a covariance's spectrum, in nats, 0 to ln(min(n, d)).

    Worked out in float64 from whichever of the two Gram matrices is smaller: their spectra agree.
    """
    centred = tokens.double() - tokens.double().mean(0)
    n, d = centred.shape
    gram = centred @ centred.T if n <= d else centred.T @ centred
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    if not (total := values.sum()):
        return 0.0
    share = values / total
    return float(-torch.special.xlogy(share, share).sum())


@torch.inference_mode()
def layer_entropies(
    oracle: LanguageOracle, ids: Sequence[int], segments: Sequence[Segment]
) -> Float[Tensor, "layers_and_1"]:
    """Return the entropy of a picture's tokens before each layer, and before the final norm."""
    visual = oracle.is_visual(torch.tensor([list(ids)]), 1)[0]
    found, language = list[float](), oracle.model.model.language_model

    def keep(states: Tensor) -> None:
        found.append(matrix_entropy(states[0, visual]))

    with ExitStack() as stack:
        for module in [*language.layers, language.norm]:  # feature maps are added in between
            stack.callback(listen(module, keep).remove)
        oracle.log_probs(ids, segments, 1, bias=False)
    return torch.tensor(found)


def collapse(entropies: Float[Tensor, "layers_and_1"]) -> int | None:
    """Return the number of layers before the ECL's pruning: the one behind which entropy fell most.

    Only the first half of the layers counts, as pruning later saves little; None where entropy
    falls sharply behind none of them.
    """
    half = max(1, (len(entropies) - 1) // 2)
    drops = -entropies.diff()[:half]
    layer = int(drops.argmax())
    return layer + 1 if drops[layer] > SHARP * entropies[layer] else None
