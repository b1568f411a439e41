"""Private symbols of vLLM that we touch: one file each, with the upstream line and a removal plan."""
