"""``/v1/era``: what this server prunes, how far it can be asked to, and how it is set."""

import platform
from importlib.metadata import version
from pathlib import Path

import transformers
import vllm
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

import era_vllm
from era_vllm.config import EraConfig
from era_vllm.vllm_plugin.families import FAMILIES
from era_vllm_server.probe import modalities
from era_vllm_server.settings import ServerSettings

router = APIRouter()


@router.get("/v1/era")
async def info(raw_request: Request) -> JSONResponse:
    """Policy, levels, limits, settings and versions; of files only whether they are set."""
    state = raw_request.app.state
    config: EraConfig = state.era_config
    return JSONResponse(
        {
            "model": state.openai_serving_models.base_model_paths[0].name,
            "prunes": config.max_pruning_rate > 0,
            "policy": config.policy,
            "families": sorted(FAMILIES),
            "modalities": modalities(state),
            "levels": {name: rate for name, rate in config.levels if config.serves(rate)},
            "limits": {
                "min_pruning_rate": config.min_pruning_rate,
                "max_pruning_rate": config.max_pruning_rate,
                "min_anchors": config.min_anchors,
                "max_model_len": state.vllm_config.model_config.max_model_len,
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


def _shown(settings: ServerSettings) -> dict[str, object]:
    """Return the settings; a file's place is nobody's business."""
    plain = settings.model_dump(mode="json")
    return {name: True if isinstance(value, Path) else plain[name] for name, value in settings}
