"""What a request says of its rates: the field, the details, their order, and the report."""

import asyncio
import math

import pytest

from era_vllm.config import EraConfig
from era_vllm.vllm_plugin.parts import PartFields
from era_vllm.vllm_plugin.requests import (
    FieldError,
    ItemRate,
    current,
    item_rates,
    reports,
    request_context,
    requested_question,
    requested_rates,
)

PLAIN = EraConfig()
BOUNDED = EraConfig(pruning_rate=0.5, min_pruning_rate=0.25, max_pruning_rate=0.8)
STOCK = EraConfig.parse({"max_pruning_rate": 0.0})
BOTH = ("image", "video")


def requested_rate(field: object, config: EraConfig) -> float | None:
    """Of a model that takes pictures alone."""
    return requested_rates(field, config, ("image",)).get("image")


@pytest.mark.parametrize(
    ("field", "rate"),
    [
        (None, None),
        ({"pruning_rate": 0}, 0.0),
        ({"pruning_rate": 0.95}, 0.95),
        ({"level": "off"}, 0.0),
        ({"level": "light"}, 0.5),
        ({"level": "medium"}, 0.778),
        ({"level": "strong"}, 0.889),
        ({"level": "extreme"}, 0.944),
    ],
    ids=str,
)
def test_the_field_names_a_rate_or_a_level(field: object, rate: float | None) -> None:
    assert requested_rate(field, PLAIN) == rate


@pytest.mark.parametrize(
    ("field", "name", "said"),
    [
        *((wrong, "era", '{"pruning_rate": number}') for wrong in (0.5, "off", [], {}, True)),
        ({"pruning_rate": 0.5, "level": "light"}, "era", '{"level": name}'),
        ({"rate": 0.5}, "era", "unknown field 'rate'"),
        ({"Level": "off"}, "era", "did you mean 'level'"),
        *(
            ({"pruning_rate": wrong}, "era.pruning_rate", "a number in [0, 0.95]")
            for wrong in (-0.1, 0.951, 1, math.nan, math.inf, 10**400, "0.5", None, True, [0.5])
        ),
        *(
            ({"level": wrong}, "era.level", "off (0), light (0.5)")
            for wrong in ("of", "OFF", "", None, 0, ["off"], {"off": 0})
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_malformed_field_is_refused_by_name_value_and_range(
    field: object, name: str, said: str
) -> None:
    with pytest.raises(FieldError) as refused:
        requested_rate(field, PLAIN)
    assert refused.value.field == name
    assert str(refused.value).startswith(f"{name}: got ")
    assert said in str(refused.value)
    assert len(str(refused.value)) < 300


def test_what_a_client_sent_is_told_in_short() -> None:
    with pytest.raises(FieldError) as refused:
        requested_rate({"level": "x" * 100_000}, PLAIN)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("config", "served", "allowed"),
    [
        (BOUNDED, {"light": 0.5, "medium": 0.778}, r"light \(0.5\), medium \(0.778\) "),
        (STOCK, {"off": 0.0}, r"off \(0\) \(levels with a rate in \[0, 0\]"),
    ],
    ids=["bounded", "stock"],
)
def test_explicit_rates_out_of_bounds_are_refused_by_any_name(
    config: EraConfig, served: dict[str, float], allowed: str
) -> None:
    for level, rate in config.levels:
        if level in served:
            assert requested_rate({"level": level}, config) == served[level]
            assert requested_rate({"pruning_rate": rate}, config) == served[level]
            continue
        with pytest.raises(FieldError, match=rf"era.level: got '{level}', allowed: {allowed}"):
            requested_rate({"level": level}, config)
        with pytest.raises(FieldError, match=r"era.pruning_rate: got .* a number in \["):
            requested_rate({"pruning_rate": rate}, config)


@pytest.mark.parametrize(
    ("field", "rates"),
    [
        (None, {}),
        ({"level": "light"}, {"image": 0.5, "video": 0.5}),
        ({"video": {"pruning_rate": 0.95}}, {"video": 0.95}),
        (
            {"image": {"level": "strong"}, "video": {"pruning_rate": 0.9}},
            {"image": 0.889, "video": 0.9},
        ),
    ],
    ids=str,
)
def test_the_field_speaks_of_both_modalities_or_of_each(
    field: object, rates: dict[str, float]
) -> None:
    assert requested_rates(field, PLAIN, BOTH) == rates


@pytest.mark.parametrize(
    ("field", "name", "said"),
    [
        ({"video": {"level": "off"}}, "era.video", "allowed: image (what this model takes)"),
        ({"image": {"level": "of"}}, "era.image.level", "off (0), light (0.5)"),
        ({"image": {"pruning_rate": 2}}, "era.image.pruning_rate", "a number in [0, 0.95]"),
        ({"image": 0.5}, "era.image", '{"level": name}'),
        ({"image": {}}, "era.image", '{"level": name}'),
        ({"image": {"image": {"level": "off"}}}, "era.image", "unknown field 'image'"),
        ({"image": {"level": "off"}, "level": "off"}, "era.level", "allowed: image"),
        ({"image": {"level": "off"}, "audio": {}}, "era.audio", "allowed: image"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_field_by_modality_is_refused_where_it_is_wrong(
    field: object, name: str, said: str
) -> None:
    with pytest.raises(FieldError) as refused:
        requested_rates(field, PLAIN, ("image",))
    assert refused.value.field == name and said in str(refused.value)
    assert len(str(refused.value)) < 300


ASKING = EraConfig(policy="cdpruner", question_aware=True)


@pytest.mark.parametrize(
    ("field", "aware", "rates"),
    [
        (None, True, {}),
        ({"level": "light"}, True, {"image": 0.5, "video": 0.5}),
        ({"question_aware": False}, False, {}),
        ({"question_aware": None}, True, {}),
        ({"question_aware": True}, True, {}),
        ({"question_aware": False, "level": "light"}, False, {"image": 0.5, "video": 0.5}),
        ({"question_aware": False, "video": {"pruning_rate": 0.9}}, False, {"video": 0.9}),
    ],
    ids=str,
)
def test_the_field_says_whether_a_question_counts(
    field: object, aware: bool, rates: dict[str, float]
) -> None:
    assert requested_question(field, ASKING) is aware
    assert requested_rates(field, ASKING, BOTH) == rates
    if not isinstance(field, dict) or not field.get("question_aware"):
        assert requested_question(field, PLAIN) is False, "of a server that asks nothing"


@pytest.mark.parametrize(
    ("config", "given", "allowed"),
    [
        *((ASKING, wrong, "true or false") for wrong in (0, 1, "no", [], {"image": True})),
        (PLAIN, True, "false, or an engine that was started with --era-question-aware"),
        (PLAIN, "no", "allowed: false"),
    ],
)
def test_a_wrong_word_on_questions_is_refused(
    config: EraConfig, given: object, allowed: str
) -> None:
    with pytest.raises(FieldError) as refused:
        requested_question({"question_aware": given}, config)
    assert refused.value.field == "era.question_aware" and allowed in str(refused.value)


@pytest.mark.parametrize(
    "field",
    [
        {"question_aware": False, "level": "light", "pruning_rate": 0.5},
        {"image": {"question_aware": False}},
        {"image": {"level": "light", "question_aware": False}},
        {"question_awar": False},
    ],
)
def test_it_stands_beside_the_rate_and_nowhere_else(field: object) -> None:
    with pytest.raises(FieldError):
        requested_rates(field, ASKING, BOTH)
    with pytest.raises(FieldError, match=r"messages\[0\].content\[1\].era: got"):
        part = PartFields("messages[0].content[1]", {"question_aware": False})
        item_rates([part], None, ASKING)


def test_a_report_says_how_long_the_question_was() -> None:
    rates = [ItemRate(0.5, "era")] * 2
    told = [one.as_dict() for one in reports(rates, [4, 4], [2, 2], ASKING, [7, 0])]
    assert [one["question_tokens"] for one in told] == [7, 0]
    (plain, _) = reports(rates, [4, 4], [2, 2], PLAIN)
    assert "question_tokens" not in plain.as_dict()


def with_details(*details: object) -> list[PartFields]:
    return [PartFields(detail=detail) for detail in details]


def test_what_is_nearest_to_an_item_decides() -> None:
    """Its part's field, its detail, the request's field, the server's default."""
    light = {"level": "light"}
    part, both = PartFields(era=light), PartFields(era=light, detail="high")
    detail, auto, none = PartFields(detail="high"), PartFields(detail="auto"), PartFields()
    for asked, rest in ((None, ItemRate(0.778, "default")), (0.6, ItemRate(0.6, "era"))):
        assert item_rates([part, both, detail, auto, none, None], asked, PLAIN) == [
            *[ItemRate(0.5, "part")] * 2,
            ItemRate(0.0, "detail"),
            *[rest] * 3,
        ]


def test_a_part_asks_for_what_the_server_serves() -> None:
    assert item_rates([PartFields(era={"pruning_rate": 0.9})], 0.5, PLAIN) == [
        ItemRate(0.9, "part")
    ]
    for wrong, place, said in (
        ({"pruning_rate": 0.9}, ".pruning_rate", "got 0.9, allowed: a number in [0.25, 0.8]"),
        ({"pruning_rate": math.nan}, ".pruning_rate", "got nan"),
        ({"level": "strong"}, ".level", "allowed: light (0.5), medium (0.778)"),
        ({"image": {"level": "light"}}, "", "unknown field 'image'"),
        ({"level": "light", "pruning_rate": 0.5}, "", 'or {"level": name}'),
        *((junk, "", 'allowed: {"pruning_rate": number}') for junk in ({}, [], 0, "light", True)),
    ):
        at = "messages[3].content[14]"
        with pytest.raises(FieldError) as refused:
            item_rates([PartFields(), PartFields(at, wrong)], None, BOUNDED)
        assert refused.value.field == f"{at}.era{place}"
        assert str(refused.value).startswith(f"{at}.era{place}: got ")
        assert said in str(refused.value) and len(str(refused.value)) < 300


def test_details_are_levels_and_go_before_the_requests_field() -> None:
    details = with_details("high", "original", "low", "auto", None)
    named = [ItemRate(0.0, "detail")] * 2 + [ItemRate(0.889, "detail")]
    assert item_rates(details, None, PLAIN) == named + [ItemRate(0.778, "default")] * 2
    assert item_rates(details, 0.5, PLAIN) == named + [ItemRate(0.5, "era")] * 2


def test_details_out_of_bounds_are_brought_into_them_and_said_to_be() -> None:
    assert item_rates(with_details("high", "low", None), None, BOUNDED) == [
        ItemRate(0.25, "detail", clamped=True),
        ItemRate(0.8, "detail", clamped=True),
        ItemRate(0.5, "default"),
    ]
    assert item_rates(with_details("high", "low"), None, STOCK) == [
        ItemRate(0.0, "detail"),
        ItemRate(0.0, "detail", clamped=True),
    ]


def test_details_follow_the_servers_own_levels() -> None:
    own = EraConfig.parse({"levels": {"off": 0, "strong": 0.6, "mine": 0.1}})
    assert item_rates(with_details("low"), None, own) == [ItemRate(0.6, "detail")]
    assert requested_rate({"level": "mine"}, own) == 0.1
    with pytest.raises(FieldError, match=r"off \(0\), mine \(0.1\), strong \(0.6\)"):
        requested_rate({"level": "light"}, own)


@pytest.mark.parametrize("detail", ["ultra", "", 3, ["low"], True])
def test_an_unknown_detail_is_refused_whatever_the_fields_say(detail: object) -> None:
    for asked, era in ((None, None), (0.5, None), (None, {"level": "off"})):
        with pytest.raises(FieldError, match="^video_url.detail: got .*high, original, low, auto"):
            item_rates([PartFields("", era, detail, "video_url.detail")], asked, PLAIN)


def test_a_report_says_level_source_and_tokens() -> None:
    rates = [ItemRate(0.889, "detail"), ItemRate(0.6, "era"), ItemRate(0.0, "detail", True)]
    first, second, third = (
        one.as_dict() for one in reports(rates, [144] * 3, [16, 58, 144], PLAIN)
    )
    assert first == {
        "pruning_rate": 0.889,
        "level": "strong",
        "source": "detail",
        "clamped": False,
        "tokens_before": 144,
        "tokens_after": 16,
    }
    assert (second["level"], second["source"], second["tokens_after"]) == (None, "era", 58)
    assert (third["level"], third["clamped"]) == ("off", True)


def test_each_request_has_a_scope_that_its_tasks_share() -> None:
    async def render(rate: float) -> None:
        await asyncio.sleep(0)
        found = current()
        assert found is not None and found.rates == {"image": rate}
        found.report({"image": reports([ItemRate(rate, "era")], [4], [2], PLAIN)})

    async def request(rate: float) -> float:
        with request_context() as opened:
            opened.rates = {"image": rate}
            await asyncio.create_task(render(rate))
            await asyncio.create_task(render(rate))
            assert (len(opened.items["image"]), len(opened.all_items)) == (1, 2)
            return opened.items["image"][0].pruning_rate

    async def both() -> list[float]:
        return await asyncio.gather(request(0.1), request(0.2))

    assert asyncio.run(both()) == [0.1, 0.2]
    assert current() is None
