"""``/v1/era``: what this server prunes, how far it can be asked to, and how it is set."""

import hashlib
import logging
import os
import platform
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import transformers
import vllm
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

import era_vllm
from era_vllm.calibration import model_identity
from era_vllm.config import EraConfig
from era_vllm.errors import ConfigError
from era_vllm.vllm_plugin.build import build
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm_server.probe import modalities
from era_vllm_server.settings import ServerSettings

logger = logging.getLogger(__name__)

router = APIRouter()
_NO_ANSWERS: Final = (
    *("host", "port", "uds", "uvicorn", "ssl", "api_", "allow", "root_path", "served_model_name"),
    *("disable_log", "enable_log", "max_log", "log_", "hf_token", "middleware", "h11", "headless"),
    "subparser",
)
"""How flags of vLLM begin that change no answer; keys are among them."""


@router.get("/v1/era")
async def info(raw_request: Request) -> JSONResponse:
    """Policy, levels, limits, settings and versions; of files only whether they are set."""
    state = raw_request.app.state
    config: EraConfig = state.era_config
    model = state.vllm_config.model_config
    return JSONResponse(
        {
            "model": state.openai_serving_models.base_model_paths[0].name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "identity": getattr(state, "era_identity", None),
            "prunes": config.max_pruning_rate > 0,
            "policy": config.policy,
            "families": sorted(FAMILIES),
            "modalities": modalities(state),
            "levels": {name: rate for name, rate in config.levels if config.serves(rate)},
            "limits": {
                "min_pruning_rate": config.min_pruning_rate,
                "max_pruning_rate": config.max_pruning_rate,
                "min_anchors": config.min_anchors,
                "max_model_len": model.max_model_len,
            },
            "settings": config.as_dict(),
            "server": _shown(state.era_settings),
            "versions": {
                "era_vllm": era_vllm.__version__,
                "vllm": vllm.__version__,
                "torch": version("torch"),
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
    )


def identity(args: Namespace, config: EraConfig) -> dict[str, str]:
    """Return what tells two servers of one name apart: hashes, which name no file.

    Reads the disk: once, before the first request, so that they are of what runs.

    Returns: ``model`` of config and weights, ``code`` of ours and the policy's, ``setup`` of what
        else changes an answer: vLLM's flags, and the model folder's tokenizer, template, processor.
    """
    folder, flags = Path(str(args.model)), vars(args).items()
    model = hashlib.sha256(f"{args.model} {args.revision}".encode()).hexdigest()
    setup = hashlib.sha256()
    for name, value in sorted((name, repr(value)) for name, value in flags):
        if not name.startswith(_NO_ANSWERS) and " at 0x" not in value:
            setup.update(f"{name} {value}\n".encode())
    if folder.is_dir():
        try:
            for file in sorted(folder.glob("*.j*")):  # .json, .jinja
                setup.update(os.fsencode(file.name) + file.read_bytes())
            model = model_identity(folder)
        except (ConfigError, OSError) as error:  # no weights (dummy ones), or not for us to read
            logger.warning("/v1/era tells this model by its name alone: %s", error)
    found = {"model": model, "setup": setup.hexdigest()}
    return {name: value[:16] for name, value in found.items()} | {"code": build(config.policy)}


def _shown(settings: ServerSettings) -> dict[str, object]:
    """Return the settings; a file's place is nobody's business."""
    plain = settings.model_dump(mode="json")
    return {name: True if isinstance(value, Path) else plain[name] for name, value in settings}
