"""Shape and type checks over the torch-only core, deterministic hypothesis, one thread.

The import hook has to be installed before anything imports those modules, so it stands first.
``config`` is left out (it refuses wrong types itself, with its own error), and so is the registry
in ``policies/__init__`` (beartype has no answer to ``type[Protocol]``).
"""

import os
import sys
from pathlib import Path

from jaxtyping import install_import_hook

POLICIES = Path(__file__).parents[1] / "era_vllm" / "policies"
CHECKED = (
    "era_vllm.types",
    "era_vllm.contracts",
    "era_vllm.pipeline",
    "era_vllm.steps",
    *(f"era_vllm.policies.{file.stem}" for file in POLICIES.glob("[!_]*.py")),
    "era_vllm.attention.reference",
)

if early := sorted(set(CHECKED) & set(sys.modules)):
    raise RuntimeError(f"imported before their type checks were installed: {', '.join(early)}")
install_import_hook(CHECKED, "beartype.beartype")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile(
    "default", derandomize=True, deadline=None, database=None, max_examples=25
)
settings.register_profile("long", settings.get_profile("default"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

torch.set_num_threads(1)
