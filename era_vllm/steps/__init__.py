"""Mathematics that policies share: entropy, similarity, search, merge, bias. Torch only."""
