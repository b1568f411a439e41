"""The support matrix: family x modality x engine feature, out of what the tests measured.

    .venv/bin/python -m tests.support      # out/situations.json -> docs/families.md, README.md

A cell is the largest difference of a log-probability from the family's oracle; "-" = not run.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from era_vllm.policies import policy_class, policy_names
from era_vllm.types import OF_EVERY_MODEL
from era_vllm.vllm_plugin.families import FAMILIES
from tests.situations import LLAVA, ROOT, Result, load

FEATURES: Final = {
    "pictures": ("one image", "several images", "several images at different rates"),
    "videos": ("videos",),
    "both": ("pictures beside videos",),
    "prefix hits": ("prefix hit",),
    "chunks": ("chunks at every awkward place",),
    "preemption": ("preemption",),
    "abort": ("abort in mid-prefill",),
    "newlines": ("other newlines",),
    "TP 2": ("tensor parallel 2",),
    "n-gram": ("n-gram speculation",),
    "KV connector": ("KV connector, another process",),
    "compile": ("torch.compile",),
    "bf16": ("bf16",),
}
"""Column -> situations. bf16 is held against stock vLLM's own error, not against float32."""
NAMES: Final = {
    LLAVA: "LLaVA-1.5",
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT (1.6)",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision",
    "InternVLForConditionalGeneration": "InternVL3, 3.5 (transformers')",
    "InternVLChatModel": "InternVL2.5, 3, 3.5 (the authors')",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL with experts",
}
MEASURED: Final = frozenset({LLAVA, "Qwen3VLForConditionalGeneration"})
"""Families of which a trained model was measured: docs/accuracy.md."""
_MARKS: Final = "<!-- support -->", "<!-- end of support -->"


def matrix(results: Mapping[str, Result]) -> str:
    """Return the table of every feature."""
    rows = [(NAMES[name], *_cells(name, results)) for name in FAMILIES]
    return "\n".join(_table(("family", *FEATURES), rows))


def overview(results: Mapping[str, Result]) -> str:
    """Return the table of every family; exact is what has a measurement."""
    rows = [
        (
            NAMES[name],
            f"`{name}`",
            " and ".join(f"{modality}s" for modality in family.modalities),
            _policies(family.target),
            _said(name, next(_cells(name, results))),
        )
        for name, family in FAMILIES.items()
    ]
    return "\n".join(_table(("family", "architecture", "takes", "policies", ""), rows))


def _said(family: str, cell: str) -> str:
    exact = "not run" if cell == "-" else "exact"
    return exact if family in MEASURED else f"{exact}, accuracy not measured"


def _policies(target: str) -> str:
    module, _, cls = target.partition(":")
    provides = getattr(importlib.import_module(module), cls).adapter.provides
    known = provides | OF_EVERY_MODEL
    names = [name for name in policy_names() if policy_class(name)().needs <= known]
    return "all" if len(names) == len(policy_names()) else ", ".join(names)


def _cells(family: str, results: Mapping[str, Result]) -> Iterator[str]:
    for situations in FEATURES.values():
        found = [
            one
            for result in results.values()
            if result.outcome == "passed" and result.situation in situations
            for one in result.measured
            if one.family == family
        ]
        yield f"{max(one.difference for one in found):.1e}" if found else "-"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def put(text: str, table: str) -> str:
    """Return a page with the table between its marks."""
    start, end = _MARKS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, "one pair of marks a page"
    return pattern.sub(lambda _: f"{start}\n{table}\n{end}", text)


PAGES: Final = {"docs/families.md": lambda: matrix(load()), "README.md": lambda: overview(load())}

if __name__ == "__main__":
    for name, table in PAGES.items():
        path = ROOT / name
        path.write_text(put(path.read_text(), table()))
        print(name)
