"""The shipped checkpoint: reads every question as trained, loads cleanly, answers well."""

import json
import math

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from era_vllm.config import EraConfig
from era_vllm.lab import CHECKPOINT
from era_vllm.lab.asking import TransformersAsker, ask, prompt_of
from era_vllm.lab.oracle import Oracle
from era_vllm.lab.samples import load_samples
from era_vllm.lab.scores import accuracy, count
from era_vllm.lab.synth.dataset import generate
from era_vllm.lab.synth.questions import FAMILIES

START, UNKNOWN, IMAGE = 1, 3, 4
TRAINED = "<s> USER : <image> what color is the circle ? ASSISTANT :"


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return LlavaProcessor.from_pretrained(CHECKPOINT)


def words(processor: LlavaProcessor, text: str, add_special_tokens: bool = True) -> str:
    tokenizer = processor.tokenizer
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    return " ".join(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize(
    "text",
    [
        "USER : <image> what color is the circle ? ASSISTANT :",
        "USER: <image>\nWhat color is the circle? ASSISTANT:",
        "USER:<image>What colour is the CIRCLE?ASSISTANT:",
        "User: <image> what color is the circles? Assistant:",
    ],
)
def test_natural_spelling_becomes_the_trained_prompt(processor: LlavaProcessor, text: str) -> None:
    assert words(processor, text) == TRAINED


def test_digits_are_apart(processor: LlavaProcessor) -> None:
    assert words(processor, "42") == "<s> 4 2"


def test_no_special_tokens_on_demand(processor: LlavaProcessor) -> None:
    assert words(processor, "yes", add_special_tokens=False) == "yes"


def test_every_word_of_the_generator_is_known(processor: LlavaProcessor) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
    pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
    texts: set[str] = set()
    for example in generate(200, seed=8, families=FAMILIES, questions_per_image=12):
        for question in example.questions:
            texts |= {question.text, question.text.capitalize(), question.answer}
    for text, ids in zip(texts, processor.tokenizer(list(texts))["input_ids"], strict=True):
        assert UNKNOWN not in ids, text
        assert ids.count(START) == 1


def test_answers_read_back_as_written(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    for answer in ("yes", "7 0 4", "bottom left"):
        ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer


def test_streamed_answer_has_no_leading_blank(processor: LlavaProcessor) -> None:
    """vLLM cuts the answer out of the decoded prompt plus answer."""
    tokenizer = processor.tokenizer
    prompt = tokenizer(TRAINED, add_special_tokens=False)["input_ids"]
    answer = tokenizer("7 0", add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    after = tokenizer.decode(prompt + answer, skip_special_tokens=True)
    assert after.removeprefix(before) == "7 0"


def picture_and(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}, {"type": "image"}]


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": picture_and("what color is the circle?")}],
        [{"role": "user", "content": picture_and("what color is the circle")}],
        [{"role": "user", "content": "<image>\nwhat color is the circle?\n"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": picture_and("what color is the circle?")},
        ],
        [
            {"role": "user", "content": picture_and("how many stars?")},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "what color is the circle?"},
        ],
    ],
    ids=["parts", "no question mark", "plain string", "system", "second turn"],
)
def test_chat_template_writes_the_trained_prompt(
    processor: LlavaProcessor, messages: list[dict[str, object]]
) -> None:
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert words(processor, prompt, add_special_tokens=False) == TRAINED
    if not isinstance(messages[-1]["content"], str):
        assert prompt == TRAINED


def test_chat_template_writes_answers(processor: LlavaProcessor) -> None:
    messages = [
        {"role": "user", "content": picture_and("what color is the circle?")},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    assert processor.apply_chat_template(messages, tokenize=False) == f"{TRAINED} red </s>"
    unfinished = processor.apply_chat_template(
        messages, tokenize=False, continue_final_message=True
    )
    assert unfinished == f"{TRAINED} red"


@pytest.mark.parametrize("role", ["system", "developer", "tool", "assistant"])
def test_chat_template_keeps_pictures_of_every_role(processor: LlavaProcessor, role: str) -> None:
    messages = [
        {"role": role, "content": [{"type": "image"}, {"type": "text", "text": "dropped"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "What color is the circle?"},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert words(processor, text, add_special_tokens=False) == TRAINED


def test_chat_template_without_a_picture(processor: LlavaProcessor) -> None:
    messages = [{"role": "user", "content": "how many shapes?"}]
    prompt = processor.apply_chat_template(messages, tokenize=False)
    assert prompt == "<s> USER : how many shapes ?"


def test_start_token_once_and_144_image_tokens(processor: LlavaProcessor) -> None:
    sample = load_samples()[0]
    content = [
        {"type": "image", "image": sample.image},
        {"type": "text", "text": "What color is the circle?"},
    ]
    through_chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"][0]
    plain = processor(
        images=sample.image, text="USER: <image>\nWhat color is the circle? ASSISTANT:"
    )["input_ids"][0]
    assert list(through_chat) == list(plain)
    assert list(plain).count(START) == 1
    assert plain[0] == START
    assert list(plain).count(IMAGE) == 144


def test_checkpoint_loads_without_a_missing_or_unexpected_weight() -> None:
    model, report = LlavaForConditionalGeneration.from_pretrained(
        CHECKPOINT, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert not any(report.values()), report


def test_weights_have_the_names_that_vllm_reads() -> None:
    header = (CHECKPOINT / "model.safetensors").read_bytes()[8:]
    names, _ = json.JSONDecoder().raw_decode(header[: 1 << 16].decode("utf-8", "replace"))
    names.pop("__metadata__")
    starts = ("vision_tower.vision_model.", "language_model.", "multi_modal_projector.")
    assert all(name.startswith(starts) for name in names)
    assert "language_model.lm_head.weight" in names


def test_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 9_000_000


def asker(dtype: torch.dtype) -> TransformersAsker:
    return TransformersAsker(Oracle(str(CHECKPOINT), dtype), EraConfig())


def test_model_answers_the_samples() -> None:
    """45 of 48 when shipped; the floor leaves room for other builds of torch."""
    samples = load_samples()
    found = count(samples, ask(asker(torch.bfloat16), samples, 0.0)).total
    assert found.asked == 48
    assert found.right >= 43


def test_unpruned_answers_are_those_of_plain_transformers(processor: LlavaProcessor) -> None:
    """The oracle feeds embeddings and decodes by itself; ``generate`` does neither."""
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    samples = load_samples()[:6]
    for sample, answers in zip(samples, ask(asker(torch.float32), samples, 0.0), strict=True):
        for question, answer in zip(sample.questions, answers, strict=True):
            inputs = processor(sample.image, prompt_of(question.text), return_tensors="pt")
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            new = tokens[0, inputs["input_ids"].shape[1] :]
            assert answer.text == processor.decode(new, skip_special_tokens=True).strip()
            assert answer.image_tokens == 144
            with torch.inference_mode():
                row = model(**inputs).logits[0, -1].log_softmax(-1)
            assert answer.first is not None and answer.seconds > 0
            for token, value in answer.first.items():
                assert value == pytest.approx(float(row[token]), abs=1e-4)
            assert sum(map(math.exp, answer.first.values())) == pytest.approx(1, abs=1e-4)


def test_pruned_answers_are_told_with_the_tokens_that_are_kept() -> None:
    (answers,) = ask(asker(torch.float32), load_samples()[:1], 0.889)
    assert {answer.image_tokens for answer in answers} == {16}
    assert len(answers) == len(load_samples()[0].questions)


def test_generated_pictures_are_answered_as_the_model_card_says() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (the lab extra)")
    pytest.importorskip("skimage", reason="needs scikit-image (the lab extra)")
    examples = list(generate(6, seed=2))
    found = accuracy(count(examples, ask(asker(torch.float32), examples, 0.0)))
    assert found is not None and found.value > 0.7
