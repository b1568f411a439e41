"""The ``era-vllm`` command: one file a subcommand."""
