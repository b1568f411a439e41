"""Families with random weights: one file each, a small checkpoint and an oracle of its own."""

from typing import Final

from tests.engine.families import internvl, internvl_hf, llava_next, llava_onevision, qwen
from tests.engine.families.case import Case

CASES: Final[tuple[Case, ...]] = (
    llava_next.CASE,
    llava_onevision.CASE,
    internvl_hf.CASE,
    internvl.CASE,
    *qwen.CASES,
)
