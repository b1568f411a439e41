"""One file a model family: image -> visual tokens. Listed by name in ``vllm_plugin/families.py``."""
