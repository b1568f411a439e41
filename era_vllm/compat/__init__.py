"""Private symbols of vLLM: one file each, with the upstream line and a removal plan."""
