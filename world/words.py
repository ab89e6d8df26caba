"""Words to read and to write: real ones, and such as nobody uses.

WORDS             three to six letters, found in any picture book
invented(rng)     a word that only its letters can tell: made up, or a real one with another letter
spelled("tree")   "t r e e"
"""

import random

WORDS = (
    "ant ape arm art bag bat bed bee big book box boy bus cake call cap car cat chair city cloud coat cold cook "
    "corn cow cup dark desk dog door dress drum dry duck ear east egg end eye face farm fast fire fish five flag "
    "foot fork four fox frog fruit game gate gift girl glass goat gold good grass hand hat head hill home horse "
    "house ice ink iron jam key king kite lake lamp land leaf leg lemon light lion lock long man map milk moon "
    "mouse name nest night nine north nose oil one open park pen phone pig plan plant plate pond queen rain read "
    "rice ring river road rock roof room root rose safe salt sand school sea seed ship shoe shop sky sleep snow "
    "sock song south spoon star stone sun table tail tea tent ten train tree truck two wall watch water west "
    "wheel wind wolf wood word yard zebra zoo"
).split()

VOWELS, CONSONANTS = "aeiou", "bcdfghjklmnpqrstvwxyz"


def spelled(word: str) -> str:
    """Letter by letter, "t r e e": a word never seen can be read so, and then written."""
    return " ".join(word)


def invented(rng: random.Random) -> str:
    """Three to six letters: consonants and vowels by turns, now and then two of a kind.

    Or a real word with one letter changed, because whoever knows "test" writes it for "tent".
    """
    if rng.random() < 0.4:
        word = rng.choice(WORDS)
        at = rng.randrange(len(word))
        return word[:at] + rng.choice(VOWELS if word[at] in VOWELS else CONSONANTS) + word[at + 1 :]
    vowel = rng.random() < 0.4
    text = ""
    for _ in range(rng.randint(3, 6)):
        text += rng.choice(VOWELS if vowel else CONSONANTS)
        vowel = not vowel if rng.random() < 0.8 else vowel
    return text
