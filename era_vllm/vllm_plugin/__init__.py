"""How the method reaches vLLM: registration, settings, processor, model mixin."""
