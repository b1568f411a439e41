"""``/v1/era``: what this server prunes, how far it can be asked to, and how it is set."""

import hashlib
import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

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

router = APIRouter()


@router.get("/v1/era")
async def info(raw_request: Request) -> JSONResponse:
    """Policy, levels, limits, settings and versions; of files only whether they are set."""
    state = raw_request.app.state
    config: EraConfig = state.era_config
    model = state.vllm_config.model_config
    return JSONResponse(
        {
            "model": state.openai_serving_models.base_model_paths[0].name,
            "model_identity": _identity(model.model, model.revision),
            "dtype": str(model.dtype).removeprefix("torch."),
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
            "code": build(config.policy),
            "versions": {
                "era_vllm": era_vllm.__version__,
                "vllm": vllm.__version__,
                "torch": version("torch"),
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
        }
    )


@cache
def _identity(model: str, revision: str | None) -> str:
    """Return what tells two models of one served name apart: a hash, which names no file."""
    if Path(model).is_dir():
        with suppress(ConfigError):  # no weights: vLLM's --load-format dummy
            return model_identity(Path(model))[:16]
    return hashlib.sha256(f"{model} {revision}".encode()).hexdigest()[:16]


def _shown(settings: ServerSettings) -> dict[str, object]:
    """Return the settings; a file's place is nobody's business."""
    plain = settings.model_dump(mode="json")
    return {name: True if isinstance(value, Path) else plain[name] for name, value in settings}
