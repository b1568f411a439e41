"""Sentences that say nothing of a picture, in the closed vocabulary: text of varying length.

A model that never saw more than a short question breaks behind a longer one.
"""

import random
from typing import Final

SENTENCES: Final = (
    "please look at this.",
    "here is a picture.",
    "look at it with care, and answer with one word.",
    "i have a question.",
    "take your time.",
    "this is a test.",
    "it is not easy to see, but please try.",
    "a friend of mine made it.",
    "it was made with a small program.",
    "there is more to see than you may think.",
    "do not say what you do not know.",
    "say only what you see.",
    "the background is a photo, and it does not matter.",
    "thank you for your help.",
    "you are a model that can see.",
    "answer the question that follows.",
    "keep the answer short.",
    "we will now go on with the next one.",
    "some of it is small.",
    "hello.",
    "let us begin.",
    "as you know, there may be nothing to find.",
)


def draw_filler(lots: random.Random, words: int) -> str:
    """Return sentences of about so many words; none for 0.

    Mutates: lots.
    """
    sentences: list[str] = []
    while words > 0:
        sentence = lots.choice(SENTENCES)
        sentences.append(sentence)
        words -= len(sentence.split())
    return " ".join(sentences)
