"""Pictures that are pruned for what is asked of them: whose entry is found, and what is answered.

Relevance and answers against transformers; caches by what is encoded and by the KV blocks found.
"""

import pytest
import torch
import transformers
from vllm.exceptions import VLLMValidationError

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT_QWEN3_VL
from era_vllm.lab.asking import messages_of
from era_vllm.lab.oracle import first_relevance
from era_vllm.lab.samples import load_task_samples
from era_vllm.lab.scout import scout_relevance
from era_vllm.types import Signal
from tests.engine.conftest import CONTROL_FACTOR, TOLERANCE, compare_with
from tests.engine.test_policies import even
from tests.peers import ASKING, CASES

RED, MANY = "what shape is red?", "how many triangles?"
BLOCK = 32


@pytest.fixture
def asking(engine, setup):
    """``asking("dpp")``: an engine that prunes for questions."""
    small = {"block_size": BLOCK}
    return lambda name="dpp", **more: engine(
        setup(question_aware=True, llm=small, **ASKING[name], **more)
    )


def prompt(text, *images, era=None):
    """A rendered prompt: its pictures, then the text, what stands behind each of them."""
    found = {"prompt": f"USER: {'<image> ' * len(images)}{text} ASSISTANT:"}
    if images:
        found["multi_modal_data"] = {"image": list(images)}
    if era is not None:
        found["mm_processor_kwargs"] = {"era": era}
    return found


def told(live, *prompts, chat=False, **more):
    """Return what was encoded for some prompts, and for each the cached tokens."""
    from vllm import SamplingParams

    before, params = live.encoded, SamplingParams(max_tokens=1, temperature=0)
    ask = live.llm.chat if chat else live.llm.generate
    outputs = [ask([one], params, use_tqdm=False, **more)[0] for one in prompts]
    return live.encoded - before, [out.num_cached_tokens for out in outputs]


def message(text, *images):
    parts = [{"type": "image_pil", "image_pil": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def marked(image, number):
    """A picture that no other test has sent."""
    found = image.copy()
    found.putpixel((1, 1), (number % 256, number // 256, 99))
    return found


SCOUTED = (
    {"scout": 1, "question_reduction": "mean"},
    {"scout": 2, "scout_injection": True},
)
HALF = {"image": [0.5]}
OFF = {"question_aware": False}


def test_two_questions_share_nothing_and_one_asked_twice_all(asking, images):
    live, image = asking(), marked(images[0], 1)
    assert told(live, prompt(RED, image, era=HALF)) == (1, [0])
    assert told(live, prompt(MANY, image, era=HALF)) == (1, [0]), "an entry of its own"
    count, (cached,) = told(live, prompt(RED, image, era=HALF))
    assert count == 0 and cached >= 64, "found in both caches"


def test_without_question_awareness_all_questions_share(asking, images):
    live, image, other = asking(), marked(images[0], 2), marked(images[0], 3)
    shared = {**HALF, **OFF}
    assert told(live, prompt(RED, image, era=HALF)) == (1, [0])
    assert told(live, prompt(MANY, image, era=shared)) == (1, [0]), "nor with who asks"
    count, (cached,) = told(live, prompt(RED, image, era=shared))
    assert count == 0 and cached >= 64
    assert told(live, prompt(RED, other, era=OFF))[0] == 1, "at the default rate"
    assert told(live, prompt(MANY, other, era=OFF))[0] == 0


def test_the_control_shares(engine, setup, images):
    """The same requests of an engine that does not ask: or the tests above could not fail."""
    live = engine(setup(policy="dpp", llm={"block_size": BLOCK}))
    image = marked(images[0], 1)
    told(live, prompt(RED, image, era=HALF))
    count, (cached,) = told(live, prompt(MANY, image, era=HALF))
    assert count == 0 and cached >= 64


def test_what_stays_whole_is_shared_by_all_questions(asking, images):
    live, image = asking(), marked(images[0], 4)
    assert told(live, *(prompt(text, image, era=0.0) for text in (RED, MANY)))[0] == 1


def test_later_turns_of_a_chat_keep_the_entry(asking, images):
    live, image = asking(), marked(images[1], 5)
    first = message(RED, image)
    turns = [first, {"role": "assistant", "content": "circle"}, {"role": "user", "content": MANY}]
    count, _ = told(live, [first], chat=True, mm_processor_kwargs={"era": 0.5})
    assert count == 1
    count, (cached,) = told(live, turns, chat=True, mm_processor_kwargs={"era": 0.5})
    assert count == 0 and cached >= 64
    again = [message(MANY, image)]
    assert told(live, again, chat=True, mm_processor_kwargs={"era": 0.5})[0] == 1
    off = {"era": {**HALF, **OFF}}
    turns = [again, [message(RED, image)]]
    assert told(live, *turns, chat=True, mm_processor_kwargs=off)[0] == 1


def test_with_a_scout_a_rendered_prompt_and_its_chat_ask_the_same(asking, images, oracle):
    """And a prompt that has nothing but the template's words behind its picture asks nothing."""
    live, image = asking(scout=2), marked(images[1], 60)
    assert told(live, prompt(RED, image, era=HALF))[0] == 1
    era = {"mm_processor_kwargs": {"era": 0.5}}
    assert told(live, [message(RED, image)], chat=True, **era)[0] == 0
    colon = "what color:"  # whose last sign the template writes too
    assert told(live, [message(colon, image)], chat=True, **era)[0] == 1
    key = live._key(image, 0.5, oracle)[0]
    expected = oracle.processor.tokenizer(colon, add_special_tokens=False)["input_ids"]
    assert questions_of(live, key) == [tuple(expected)] and len(expected) == 3
    assert told(live, [message("", image)], chat=True, **era)[0] == 1
    assert told(live, prompt("", image, era=HALF))[0] == 0


def questions_of(live, *images):
    return [
        next(
            one.item.plan.question
            for one in reversed(live.items.values())
            if one.item.pixel_hash == key
        )
        for key in images
    ]


def test_a_question_is_the_message_or_the_text_up_to_the_next_picture(asking, images, oracle):
    from era_vllm.pixels import pixel_hash

    live = asking()
    one, other = (marked(images[2], number) for number in (6, 7))
    keys = [pixel_hash(oracle.pixels(image)[0]) for image in (one, other)]
    tokenizer = oracle.processor.tokenizer
    ids = {
        text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (RED, MANY, f"{RED} ASSISTANT:", "red", f"red\n{MANY}")
    }
    content = [
        {"type": "text", "text": "red"},
        *message("", one, other)["content"][:2],
        {"type": "text", "text": MANY},
    ]
    told(live, [{"role": "user", "content": content}], chat=True)
    assert questions_of(live, *keys) == [ids[f"red\n{MANY}"]] * 2
    two = {
        "prompt": f"USER: <image> {MANY} <image> {RED} ASSISTANT:",
        "multi_modal_data": {"image": [one, other]},
    }
    live.items.clear()
    told(live, two)
    found = questions_of(live, *keys)
    assert [tokenizer.decode(list(question)).split() for question in found] == [
        tokenizer.decode(list(ids[text])).split() for text in (MANY, f"{RED} ASSISTANT:")
    ]


@pytest.mark.parametrize(
    ("name", "more"), [*((name, {}) for name in ASKING), *(("dpp", scouted) for scouted in SCOUTED)]
)
def test_relevance_and_answers_are_those_of_transformers(asking, ask, oracle, images, name, more):
    live = asking(name, **more)
    chosen = []
    for question in (RED, MANY):
        image = marked(images[3], 8)
        request = ask(question, image)
        (answer,) = live.ask([request])
        tokens, result, row = live.pruned[live._key(image, 0.778, oracle)]
        filled = oracle.processor.tokenizer(request.prompt()["prompt"])["input_ids"]
        behind = filled[filled.index(oracle.image_token) + 1 :]
        if live.config.scout:  # the template's words, which are the scout's to add
            assert list(live.model.era.scout_suffix) == behind[-2:]
            behind = behind[:-2]
        expected = oracle.tokens([image], live.config, [tuple(behind)])
        read = tokens.signals[Signal.RELEVANCE][row]
        relevance = expected.signals[Signal.RELEVANCE][0]
        difference = float((read - relevance).abs().max())
        print(f"{name}: relevance {difference:.1e} of {float(relevance.max()):.2g}")
        assert difference < 1e-6 < 1e-3 < float(relevance.max() - relevance.min())
        anchors = live.anchors_of(image, 0.778, oracle)
        own = oracle.reduce([image], live.config, 0.778, [tuple(behind)]).anchors[0]
        assert len(set(own.tolist()) & set(anchors[0].tolist())) >= 30, "near ties apart"
        segments = oracle.recycle([image], live.config, anchors)
        ids = [*answer.prompt_ids, *answer.token_ids][:-1]
        exact = compare_with(oracle, ids, segments, answer.log_probs, live.config).exact
        control = even(oracle, image, 32)
        other = compare_with(oracle, ids, control, answer.log_probs, live.config).exact
        print(f"{name}, {question}: difference {exact:.1e}, other anchors {other:.1e}")
        assert exact < TOLERANCE and other > CONTROL_FACTOR * TOLERANCE
        chosen.append(anchors[0].tolist())
    assert chosen[0] != chosen[1], "another question, other tokens"


@pytest.mark.parametrize("name", ["dpp", "cdpruner", "mfpruner"])
def test_brute_force_decides_what_is_kept(asking, oracle, images, name):
    """On Hugging Face's features and signals, with nothing of the package's own mathematics."""
    live, clear = asking(name), 0
    _, expected = CASES[name if name == "cdpruner" else f"{name}, relevance"]
    for place, image in enumerate(images):
        image = marked(image, 20 + place)
        told(live, prompt(RED, image, era=0.889))
        filled = oracle.processor.tokenizer(prompt(RED, image)["prompt"])["input_ids"]
        behind = tuple(filled[filled.index(oracle.image_token) + 1 :])
        found = expected(oracle.tokens([image], live.config, [behind]), 16)
        if found.margin > 5e-6:
            clear += 1
            _, result, row = live.pruned[live._key(image, 0.889, oracle)]
            assert result.anchors[row].tolist() == found.anchors.tolist()
    print(f"{name}: {clear} of {len(images)} clear")
    assert clear >= 1, "float32 may rightly decide otherwise in all"


@pytest.mark.parametrize("name", ["dpp", "mfpruner"])
def test_without_a_question_the_policy_is_the_one_that_asks_nothing(
    asking, engine, setup, oracle, images, name
):
    live, image = asking(name), marked(images[4], 9)
    plain = engine(setup(policy=name, llm={"block_size": BLOCK}))
    told(live, prompt(RED, image, era={**HALF, **OFF}))
    told(plain, prompt(RED, image, era=HALF))
    key = live._key(image, 0.5, oracle)
    (_, one, row), (_, other, place) = live.pruned[key], plain.pruned[key]
    assert torch.equal(one.anchors[row], other.anchors[place])
    assert torch.equal(one.log_bias[row], other.log_bias[place])
    assert torch.equal(one.embeds[row], other.embeds[place])


@pytest.mark.parametrize("more", [{}, {"scout": 2}], ids=str)
def test_neighbours_do_not_matter(asking, images, oracle, more):
    """Asked together, each item is what it is alone; one of them is asked nothing."""
    live = asking(**more)
    some = [marked(images[5], 30 + number) for number in range(3)]
    asked = list(zip(some, (RED, f"{RED} {MANY}", RED), (HALF, HALF, {**HALF, **OFF}), strict=True))
    together = [prompt(text, image, era=era) for image, text, era in asked]
    from vllm import SamplingParams

    live.llm.generate(together, SamplingParams(max_tokens=1), use_tqdm=False)
    keys = [live._key(image, 0.5, oracle) for image in some]
    whole = [live.pruned[key] for key in keys]
    live.llm.reset_prefix_cache()
    live.core.reset_encoder_cache()
    before = live.encoded
    for one in together:
        live.llm.generate([one], SamplingParams(max_tokens=1), use_tqdm=False)
    assert live.encoded == before + 3
    for key, (tokens, result, row) in zip(keys, whole, strict=True):
        alone, own, place = live.pruned[key]
        for signal in {Signal.RELEVANCE, Signal.SCOUT_STATES} & set(tokens.signals):
            close = tokens.signals[signal][row], alone.signals[signal][place]
            assert torch.allclose(*close, atol=1e-6 if signal == Signal.RELEVANCE else 1e-5)
        assert torch.equal(result.anchors[row], own.anchors[place])
    nothing = whole[2][0].signals[Signal.RELEVANCE][whole[2][2]]
    assert not nothing.any()


@pytest.mark.parametrize(
    ("era", "said"),
    [
        ({"question_aware": "no"}, "question_aware: got 'no', allowed: true or false"),
        ({"questions": {"image": [[1]]}}, "questions.*the prompt's own text"),
    ],
)
def test_what_is_refused(asking, images, era, said):
    with pytest.raises(VLLMValidationError, match=said):
        told(asking(), prompt(RED, images[0], era=era))


def test_an_engine_that_does_not_ask_says_so(engine, setup, images):
    live = engine(setup(policy="dpp", llm={"block_size": BLOCK}))
    with pytest.raises(VLLMValidationError, match="question_aware: got True, allowed: false, or "):
        told(live, prompt(RED, images[0], era={"question_aware": True}))
    assert told(live, prompt(RED, marked(images[0], 40), era=OFF))[0] == 1


def test_adapters_of_the_language_model_are_refused(engine, setup):
    with pytest.raises(ValueError, match="--enable-lora.* use --era-policy dpp"):
        engine(setup(question_aware=True, policy="cdpruner", llm={"enable_lora": True}))


def test_settings_reach_the_fingerprint():
    one = EraConfig(policy="cdpruner", question_aware=True)
    other = EraConfig(policy="cdpruner", question_aware=True, question_reduction="mean")
    assert one.fingerprint() != other.fingerprint()


def relevance_of(model, features, grid, asked, era):
    """Return that of a picture of the Qwen3-VL by transformers."""
    language, table = model.model.language_model, model.get_input_embeddings()
    rows = features.pooler_output[0]
    if not era.scout:
        return first_relevance(language.layers, table, rows, asked, "largest")
    asked = (*asked, *era.scout_suffix)
    start, (_, tall, wide) = len(era.scout_prefix), (grid[0] // torch.tensor([1, 2, 2])).tolist()
    places = [[place] * 3 for place in range(start)]
    places += [
        [start, start + row, start + column] for row in range(tall) for column in range(wide)
    ]
    places += [[start + max(tall, wide) + place] * 3 for place in range(len(asked))]
    visual = torch.zeros(1, len(places), dtype=torch.bool)
    visual[:, start : start + len(rows)] = True
    more = {
        "position_ids": torch.tensor(places).T[:, None],
        "visual_pos_masks": visual,
        "deepstack_visual_embeds": [torch.cat([*one]) for one in features.deepstack_features],
    }
    return scout_relevance(language, era.scout_prefix, rows, asked, era, more)


@pytest.mark.parametrize("scout", [0, 3])
def test_pictures_and_videos_of_the_small_qwen3_vl(engine, setup, images, scout):
    """Grouped heads, query and key norms, riders; a video's frames share its question.

    With a scout also three axes of positions, and feature maps behind its layers.
    """
    path = str(CHECKPOINT_QWEN3_VL)
    live = engine(setup(model=path, policy="cdpruner", question_aware=True, scout=scout))
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    content = {"prompt": f"{mark}what shape is red?", "multi_modal_data": {"image": images[0]}}
    live.llm.generate(content, use_tqdm=False)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    processor = transformers.AutoProcessor.from_pretrained(path)
    given = processor.image_processor(images=[images[0]], return_tensors="pt")
    asked = tuple(processor.tokenizer("what shape is red?", add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        features = model.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        expected = relevance_of(model, features, given["image_grid_thw"], asked, live.model.era)
    (item,) = live.items.values()
    assert item.item.plan.question == asked
    (segment,) = item.segments
    read = segment.tokens.signals[Signal.RELEVANCE][segment.row, 0]
    difference = float((read - expected).abs().max())
    print(f"relevance: difference {difference:.1e} of {float(expected.max()):.2g}")
    assert difference < 1e-6
    film = next(one for one in load_task_samples() if one.media[0].kind == "video")
    (messages, *_) = messages_of(film)
    content = [*messages[0]["content"][:-1], {"type": "text", "text": "how many shapes?"}]
    again = [{**messages[0], "content": content}]
    live.items.clear()
    for expects, asks in ((1, messages), (0, messages), (1, again), (0, again)):
        count, _ = told(live, asks, chat=True)
        assert count == expects * len(film.media)
    frames = [one for one in live.items.values() if len(one.segments) > 1]
    assert frames and all(one.item.plan.question for one in frames)
