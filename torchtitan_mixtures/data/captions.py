"""English phrases of named things: articles, plurals, keywords. Good enough for training text."""

import random
from collections.abc import Sequence

CAPTION_FRAMES = ("{}", "{}", "a drawing of {}", "an emoji of {}", "a picture of {}", "this is {}")
STYLE_FRAMES = (", drawn in the style of {}", " in the {} style", ", {} style")

# Exceptions to the rules below, found by reading all names once. A rare odd plural does no harm.
_IRREGULAR_PLURALS = {
    "man": "men", "woman": "women", "person": "people", "child": "children", "mouse": "mice",
    "foot": "feet", "tooth": "teeth", "leaf": "leaves", "wolf": "wolves", "knife": "knives",
    "scarf": "scarves", "loaf": "loaves", "fish": "fish", "sheep": "sheep", "deer": "deer",
    "bison": "bison", "moose": "moose", "ox": "oxen", "potato": "potatoes", "tomato": "tomatoes",
}  # fmt: skip
_HEAD_ENDS = """
with without in on of for from behind over to at and or not into as savoring holding showing facing
blowing getting wearing taking feeding cartwheeling crossed raised pointing tilted increasing
decreasing curving turning balancing lifting playing bouncing running walking kneeling standing
surfing swimming biking rowing climbing juggling golfing fencing pouting frowning gesturing tipping
shrugging facepalming bowing steaming vomiting exhaling holds shaking blows
"""
_UNCOUNTABLE_WORDS = """
rice bread spaghetti popcorn salt butter bacon honey sushi tofu ice milk tea sake corn broccoli
garlic ginger money music fire water yarn thread hair moai furniture luggage tennis golf ping-pong
basketball soccer lacrosse cricket skiing fog lightning wood hockey makeup oden camping people men
women
"""
_PROPER_NAMES = """
aries taurus gemini cancer leo virgo libra scorpio sagittarius capricorn aquarius pisces ophiuchus
mrs. mx santa mount tokyo statue
"""
_HEAD_END_SET = frozenset(_HEAD_ENDS.split())
_UNCOUNTABLE_SET = frozenset(_UNCOUNTABLE_WORDS.split())
_PROPER_SET = frozenset(_PROPER_NAMES.split())
_SINGULAR_ENDINGS = ("ss", "us", "is", "gas", "lens", "canvas")
_A_NOT_AN = ("uni", "use", "euro", "one-", "one ", "ufo", "ewe")
_AN_NOT_A = ("SOS ", "NG ", "hour", "8")


def describe(name: str, keywords: Sequence[str], style: str, rng: random.Random) -> str:
    """A caption such as "a red fox, drawn in the style of noto: animal, face".

    Args:
        name: What the picture shows.
        keywords: Words about it; none to four are used.
        style: What to call the style; used half of the time.
        rng: The only source of variety.
    """
    phrase = rng.choice((name, with_article(name), with_article(name)))
    caption = rng.choice(CAPTION_FRAMES).format(phrase)
    if rng.random() < 0.5:
        caption += rng.choice(STYLE_FRAMES).format(style)
    count = min(rng.randint(0, 4), len(keywords))
    if count:
        caption += ": " + ", ".join(rng.sample(keywords, count))
    return caption


def join_names(names: Sequence[str]) -> str:
    """ "a bell and an apple"."""
    return " and ".join(with_article(name) for name in names)


def is_countable(name: str) -> bool:
    """Whether "two" and a plural of `name` make sense."""
    return not (":" in name or " and " in name or takes_no_article(name))


def takes_no_article(name: str) -> bool:
    """Whether `name` is a proper name, a plural or a substance."""
    words = _head(name).split()
    last = words[-1].lower()
    is_plural = last.endswith("s") and not last.endswith(_SINGULAR_ENDINGS)
    return (
        name.isdigit()
        or words[0].lower() in _PROPER_SET
        or last in _UNCOUNTABLE_SET
        or (is_plural and words[-1] != "SOS")
    )


def with_article(name: str) -> str:
    """`name` with "a" or "an" in front, or as it is where English takes none."""
    if ":" in name or takes_no_article(name):
        return name
    lowered = name.lower()
    vowel = lowered.startswith(tuple("aeiou")) and not lowered.startswith(_A_NOT_AN)
    return f"{'an' if vowel or name.startswith(_AN_NOT_A) else 'a'} {name}"


def pluralize(name: str) -> str:
    """The plural of a countable name: its head noun changes, as in "faces with tears of joy"."""
    head = _head(name)
    stem, _, noun = head.rpartition(" ")
    if noun in _IRREGULAR_PLURALS:
        plural = _IRREGULAR_PLURALS[noun]
    elif noun.endswith(("s", "x", "z", "ch", "sh")):
        plural = noun + "es"
    elif noun.endswith("y") and noun[-2:-1] not in "aeiou":
        plural = noun[:-1] + "ies"
    else:
        plural = noun + "s"
    return f"{stem} {plural}".strip() + name[len(head) :]


def _head(name: str) -> str:
    """The words up to and including the head noun of a name."""
    words = name.split(" ")
    for index, word in enumerate(words[1:], start=1):
        if word in _HEAD_END_SET or word.startswith("("):
            return " ".join(words[:index])
    return name
