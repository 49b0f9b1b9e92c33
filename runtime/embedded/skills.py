"""What the embedded model can do: skills whose answers a few lines of Python can check.

A prompt is one line, `skill: argument` and a newline; the answer is the text after it, up to the end token.

    reverse: planet    -> tenalp          a word of 1 to 10 lower-case letters, backwards
    sort: planet       -> aelnpt          its letters in alphabetical order
    upper: planet      -> PLANET          in capitals
    count: banana a    -> 3               how often a letter occurs in the word
    add: 47 + 85       -> 132             two numbers of 0 to 99
    spell: 407         -> four hundred seven      a number of 0 to 9999 in English words

About one prompt in ten is held out by a hash of the prompt itself, so the same prompts are held out in
every process, on every Python and whatever was drawn before: what is measured was never trained on. For
`add` the hash is of the unordered pair, because 85 + 47 would give 47 + 85 away.

This module knows nothing of the model, the tokenizer or torch.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType

MAX_WORD_LENGTH = 10
HELD_OUT_ONE_IN = 10

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_CONSONANTS = (*"bcdfghjklmnprstvwxyz", "br", "ch", "cl", "dr", "gr", "pl", "qu", "sh", "st", "th", "tr")
_VOWELS = (*"aeiou", "ai", "ea", "ee", "ie", "oo", "ou")
_LENGTH_WEIGHTS = (1, 2, 4, 6, 7, 8, 8, 9, 10, 11)


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its only right answer.

    Attributes:
        skill: a member of `SKILLS`.
        prompt: `"skill: argument\\n"`, everything the model is given.
        answer: what it must say before the end token, with no newline.
    """

    skill: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Skill:
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]
    key: Callable[[str], str] = str  # what is hashed; equal for prompts that give each other away
    weight: float = 1.0  # share of the training stream, larger for what is learnt more slowly


def _random_letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def _repetitive_letters(rng: random.Random, length: int) -> str:
    """Letters from a handful, as in `banana`: repeats are what `sort` and `count` get wrong first."""
    return "".join(rng.choices(rng.sample(string.ascii_lowercase, rng.randint(1, 4)), k=length))


def _syllables(rng: random.Random, length: int) -> str:
    word = rng.choice(_VOWELS) if rng.random() < 0.2 else ""
    while len(word) < length:
        word += rng.choice(_CONSONANTS) + rng.choice(_VOWELS)
    return word[:length]


def _word(rng: random.Random, repetitive: float = 0.2) -> str:
    length = rng.choices(range(1, MAX_WORD_LENGTH + 1), _LENGTH_WEIGHTS)[0]
    if rng.random() < repetitive:
        return _repetitive_letters(rng, length)
    return rng.choice((_random_letters, _syllables))(rng, length)


def _letter_in_word(rng: random.Random) -> str:
    word = _word(rng, repetitive=0.6)
    letter = rng.choice(word) if rng.random() < 0.75 else rng.choice(string.ascii_lowercase)
    return f"{word} {letter}"


def _sum(rng: random.Random) -> str:
    return f"{rng.randint(0, 99)} + {rng.randint(0, 99)}"


def _number(rng: random.Random) -> str:
    # Uniform numbers would hardly ever be short ones.
    return str(rng.randrange(rng.choices((10, 100, 1_000, 10_000), (1, 2, 4, 8))[0]))


def _solve_count(argument: str) -> str:
    word, letter = argument.split()
    return str(word.count(letter))


def _operands(argument: str) -> list[int]:
    return [int(operand) for operand in argument.split(" + ")]


def _in_words(number: int) -> str:
    for unit, name in ((1_000, "thousand"), (100, "hundred")):
        if number >= unit:
            rest = f" {_in_words(number % unit)}" if number % unit else ""
            return f"{_ONES[number // unit]} {name}{rest}"
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")


_TABLE: Mapping[str, _Skill] = MappingProxyType(
    {
        "reverse": _Skill(_word, lambda word: word[::-1], weight=1.5),
        "sort": _Skill(_word, lambda word: "".join(sorted(word)), weight=2.0),
        "upper": _Skill(_word, str.upper, weight=0.5),
        "count": _Skill(_letter_in_word, _solve_count, weight=3.0),
        "add": _Skill(
            _sum,
            lambda argument: str(sum(_operands(argument))),
            key=lambda argument: str(sorted(_operands(argument))),
            weight=3.0,
        ),
        "spell": _Skill(_number, lambda number: _in_words(int(number)), weight=1.0),
    }
)

SKILLS: tuple[str, ...] = tuple(_TABLE)


def held_out(skill: str, count: int, seed: int = 0) -> list[Example]:
    """`count` distinct prompts of one skill that training never sees; the same ones for the same seed.

    Raises:
        ValueError: the skill is unknown, or has fewer than `count` held-out prompts (`add` and `spell` have
            about a thousand each).
    """
    known = _skill(skill)
    rng = random.Random(f"held out {skill} {seed}")
    found: dict[str, Example] = {}
    # One draw in ten is held out, so only a space that is nearly used up needs this many.
    for _ in range(100_000 + 100 * count):
        if len(found) >= count:
            break
        argument = known.draw(rng)
        if _is_held_out(skill, argument):
            found.setdefault(argument, _example(skill, argument))
    if len(found) < count:
        raise ValueError(f"skill {skill!r} has only about {len(found)} held-out prompts, not {count}")
    return list(found.values())


def training_stream(seed: int = 0) -> Iterator[Example]:
    """Training examples without end, no held-out prompt among them; the same ones for the same seed."""
    rng = random.Random(f"training {seed}")
    weights = [skill.weight for skill in _TABLE.values()]
    while True:
        skill = rng.choices(SKILLS, weights)[0]
        argument = _TABLE[skill].draw(rng)
        if not _is_held_out(skill, argument):
            yield _example(skill, argument)


def is_exact(example: Example, completion: str) -> bool:
    """Whether `completion`, the text before the end token, is the answer and nothing else."""
    return completion == example.answer


def _skill(name: str) -> _Skill:
    if name not in _TABLE:
        raise ValueError(f"unknown skill {name!r}: the skills are {', '.join(SKILLS)}")
    return _TABLE[name]


def _example(skill: str, argument: str) -> Example:
    return Example(skill, f"{skill}: {argument}\n", _TABLE[skill].solve(argument))


def _is_held_out(skill: str, argument: str) -> bool:
    key = f"{skill}: {_TABLE[skill].key(argument)}"
    # Not hash(): it differs from one process to the next.
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % HELD_OUT_ONE_IN == 0
