"""KV cache + bias -> output: the dense oracle, where the bias lives, and the layer that uses it."""
