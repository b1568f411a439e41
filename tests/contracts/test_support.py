"""docs/families.md and the README keep up with the families; not with the numbers."""

import pytest

from era_vllm.vllm_plugin.families import FAMILIES

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]


def test_every_family_is_in_the_support_matrix() -> None:
    from tests import support

    for name in support.PAGES:
        text = (support.ROOT / name).read_text()
        assert support.put(text, "x") != text
        assert all(f"| {support.NAMES[family]} |" in text for family in FAMILIES)
    readme = (support.ROOT / "README.md").read_text()
    assert support.put(readme, support.overview()) == readme
