"""``qexp_grammar``: minimal pairs of grammatical and ungrammatical sentences, made from templates.

Four phenomena (subject-verb agreement across a distractor noun, determiner-noun agreement, gender and number of
reflexive pronouns) over the common words of nineteenth-century prose, which is what the embedded model has read. The
two sentences of a pair differ in one word. Pairs are drawn by a private generator and shuffled, so that the first n of
them are a fair sample; the list never changes (VERSION counts). The idea of minimal pairs is BLiMP's (Warstadt et al.
2020, arXiv:1912.00582); words and templates are ours.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

VERSION = 1
PER_PHENOMENON = 150

MEN = ("man", "boy", "king", "father", "brother", "husband", "gentleman", "uncle", "son", "prince")
WOMEN = ("woman", "girl", "queen", "mother", "sister", "wife", "lady", "aunt", "daughter", "princess")
IRREGULAR = {"man": "men", "woman": "women", "wife": "wives", "gentleman": "gentlemen", "lady": "ladies"}
PEOPLE = ("captain", "doctor", "soldier", "servant", "friend", "stranger", "child", "teacher", "officer", "neighbour")
THINGS = ("house", "garden", "window", "letter", "book", "river", "tree", "horse", "door", "road", "room", "field")
IRREGULAR |= {"child": "children", "princess": "princesses"}
VERBS = (("is", "are"), ("was", "were"), ("has", "have"), ("seems", "seem"), ("stands", "stand"), ("looks", "look"))
PREDICATES = {
    "is": ("very old", "well known", "in the town"),
    "was": ("very old", "well known", "in the town"),
    "has": ("been here before", "become quite old"),
    "seems": ("very old", "quite new to me"),
    "stands": ("near the church", "before us now"),
    "looks": ("very old", "quite new to me"),
}
PREPOSITIONS = ("near", "behind", "beside", "before")
DETERMINERS = (("this", "these"), ("that", "those"))
SIGHTS = ("I saw", "He remembered", "She knew", "They came to see", "We had found", "You have heard of")
ENDINGS = ("in the morning", "with great care", "at last", "once more", "in the evening", "before dinner")
DEEDS = ("hurt", "blamed", "saved", "praised", "found", "defended", "forgot", "deceived")


@dataclass(frozen=True)
class Pair:
    """One item: the same sentence right and wrong, and the phenomenon it tests."""

    good: str
    bad: str
    phenomenon: str


def pairs() -> list[Pair]:
    """Return the 600 distinct pairs, always the same, in an order that mixes the phenomena."""
    rng = random.Random(VERSION)
    makers: dict[str, Callable[[random.Random], tuple[str, str]]] = {
        "subject_verb": _subject_verb,
        "determiner_noun": _determiner_noun,
        "anaphor_gender": _anaphor_gender,
        "anaphor_number": _anaphor_number,
    }
    made = []
    for phenomenon, make in makers.items():
        distinct: dict[tuple[str, str], None] = {}
        while len(distinct) < PER_PHENOMENON:
            distinct[make(rng)] = None
        made += [Pair(_sentence(good), _sentence(bad), phenomenon) for good, bad in distinct]
    rng.shuffle(made)
    return made


def plural(noun: str) -> str:
    """Return the plural of one of our nouns."""
    return IRREGULAR.get(noun, noun + "s")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _number(rng: random.Random, noun: str) -> tuple[str, int]:
    """Return the noun in a random number, 0 singular, 1 plural."""
    number = rng.randrange(2)
    return (plural(noun) if number else noun), number


def _subject_verb(rng: random.Random) -> tuple[str, str]:
    """The friends near the house are (*is) very old: half of the subjects carry a noun of the other number."""
    subject, number = _number(rng, rng.choice(PEOPLE + THINGS))
    if rng.randrange(2):
        other = rng.choice([noun for noun in THINGS if noun not in subject])
        subject += f" {rng.choice(PREPOSITIONS)} the {other if number else plural(other)}"
    verb = rng.choice(VERBS)
    rest = rng.choice(PREDICATES[verb[0]])
    return f"the {subject} {verb[number]} {rest}", f"the {subject} {verb[1 - number]} {rest}"


def _determiner_noun(rng: random.Random) -> tuple[str, str]:
    """I saw this house (*houses) once more."""
    number, noun = rng.randrange(2), rng.choice(PEOPLE + THINGS)
    forms = (noun, plural(noun))
    start = f"{rng.choice(SIGHTS)} {rng.choice(DETERMINERS)[number]}"
    end = rng.choice(ENDINGS)
    return f"{start} {forms[number]} {end}", f"{start} {forms[1 - number]} {end}"


def _anaphor_gender(rng: random.Random) -> tuple[str, str]:
    """The queen praised herself (*himself)."""
    male = rng.randrange(2)
    noun, deed, end = rng.choice(MEN if male else WOMEN), rng.choice(DEEDS), rng.choice(ENDINGS)
    good, bad = ("himself", "herself") if male else ("herself", "himself")
    return f"the {noun} {deed} {good} {end}", f"the {noun} {deed} {bad} {end}"


def _anaphor_number(rng: random.Random) -> tuple[str, str]:
    """The sisters saved themselves (*herself)."""
    male = rng.randrange(2)
    noun, number = _number(rng, rng.choice(MEN if male else WOMEN))
    forms = ("himself" if male else "herself", "themselves")
    deed, end = rng.choice(DEEDS), rng.choice(ENDINGS)
    return f"the {noun} {deed} {forms[number]} {end}", f"the {noun} {deed} {forms[1 - number]} {end}"
