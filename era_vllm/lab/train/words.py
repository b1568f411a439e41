"""The closed vocabulary of the small Qwen3-VL, its tokenizer and its chat template.

Word by word, digits and punctuation apart, Qwen's special tokens; plurals of shapes and capitals
are folded in, as the shipped LLaVA's tokenizer does. A timestamp "<1.2 seconds>" is six words.
"""

import re
from typing import TYPE_CHECKING, Final

from era_vllm.lab.synth.assets import SHAPES, WORDS
from era_vllm.lab.synth.filler import SENTENCES
from era_vllm.lab.synth.questions import plural
from era_vllm.lab.synth.scene import COLORS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
)
PAD, TURN, END, VISION_START, VISION_END, IMAGE, VIDEO, UNKNOWN = range(len(SPECIAL))
VOCABULARY_SIZE: Final = 256
"""Rows of the embedding: some stay free."""
_ASKED: Final = """
user assistant system ? . , : ; < > ! ' seconds second first third fourth picture video
is there a an the are in what color shape how many where which shows show shown word number chart
from left right of above below top middle bottom center value bar tallest yes no does sign say way
move when turn appear disappear up down and or with on it this that image photo frame moment not
"""


def vocabulary() -> dict[str, int]:
    """Return ids by word."""
    asked = _ASKED.split()
    filler = [word for sentence in SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence)]
    words = dict.fromkeys(
        [*SPECIAL, *map(str, range(10)), *asked, *SHAPES, *COLORS, *WORDS, *filler]
    )
    assert len(words) <= VOCABULARY_SIZE, len(words)
    return {word: index for index, word in enumerate(words)}


def tokenizer() -> "Tokenizer":
    """Make the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    made = Tokenizer(models.WordLevel(vocabulary(), unk_token=SPECIAL[UNKNOWN]))
    nouns = ("color", "shape", "picture", "image", *SHAPES)
    folded = {"colours?": "color", **{plural(noun): noun for noun in nouns}}
    made.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            *(normalizers.Replace(Regex(rf"\b{word}\b"), other) for word, other in folded.items()),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    made.decoder = decoders.Sequence(  # words joined with blanks; a streamed answer has none first
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
            decoders.Replace(Regex("\\bassistant$"), "assistant "),
        ]
    )
    made.add_special_tokens(list(SPECIAL))
    return made


CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] in ['image', 'image_url'] -%}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] in ['video', 'video_url'] -%}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'text' -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""Qwen's form: parts stand where the request puts them."""
