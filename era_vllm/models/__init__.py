"""One file a model family: image -> visual tokens. Their names: ``vllm_plugin/families.py``."""
