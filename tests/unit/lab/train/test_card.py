"""The model card's table."""

from era_vllm.lab.synth.tasks import TASK_FAMILIES
from era_vllm.lab.train.card import EXAMPLES, table


def test_every_family_has_an_example() -> None:
    assert set(EXAMPLES) == set(TASK_FAMILIES)


def test_yes_and_no_stay_out_of_the_mean() -> None:
    lines = table({"exist": (1, 10), "where": (5, 10), "color": (10, 10)}).splitlines()
    assert lines[2].startswith("| exist | is there a red circle? | 1 / 10 | 10.0 | 1.8-40.4 | 50 |")
    assert "**75.0**" in lines[-1] and len(lines) == 6
