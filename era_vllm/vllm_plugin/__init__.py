"""How the method reaches vLLM: registration, settings, processor, model mixin, one step's biases."""
