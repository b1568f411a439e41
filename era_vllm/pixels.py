"""The hash of a picture's pixel values: the only chance that a policy may use."""

import hashlib

import torch
from torch import Tensor


def pixel_hash(pixels: Tensor) -> int:
    """Return a signed 64-bit hash of one image's pixel values, as they are given to the tower.

    Args:
        pixels: Any shape and dtype; the bits count, so another dtype is another hash.
    """
    raw = pixels.detach().cpu().contiguous().view(torch.uint8).numpy()
    digest = hashlib.blake2b(raw, digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
