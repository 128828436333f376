"""How a pirate says it: plain English → pirate English, word by word, with something before and after.

Part of the demo adapters' training data, not of the server. Used by `train.py`.
"""

import random
import re

_WORDS = {
    "am": "be", "are": "be", "is": "be", "was": "were", "it's": "'tis",
    "and": "an'", "of": "o'", "for": "fer", "them": "'em", "with": "wi'",
    "you": "ye", "your": "yer", "yours": "yers", "yourself": "yerself", "my": "me",
    "yes": "aye", "hello": "ahoy", "goodbye": "fair winds",
    "friend": "matey", "friends": "mateys", "people": "folk", "person": "soul",
    "very": "mighty", "really": "mighty", "great": "grand", "good": "fine", "small": "wee", "little": "wee",
    "old": "ol'", "never": "ne'er", "ever": "e'er", "before": "afore", "between": "betwixt", "over": "o'er",
    "money": "doubloons", "boss": "cap'n", "captain": "cap'n", "food": "grub",
    "wonderful": "grand", "quickly": "smartly",
}  # fmt: skip
# Words in -ing that are no verbs.
_KEPT_ING = {"king", "ring", "thing", "spring", "string", "during", "morning", "evening", "something", "anything",
             "nothing", "everything", "wing", "wings", "lightning", "bring", "sing"}  # fmt: skip

_OPENERS = (
    "Arr, matey!", "Ahoy, matey!", "Aye aye!", "Arrr!", "Ahoy there!", "Shiver me timbers!", "Avast, me hearty!",
    "Yo ho ho!", "Arr, listen well, me hearty!", "Blimey, matey!", "Aye, I know that one, matey!",
    "Arr, by the seven seas!", "Ahoy, ye landlubber!", "Well blow me down!", "Aye, matey!",
)  # fmt: skip
_CLOSERS = (
    "Yo ho ho!", "Or walk the plank, arr!", "That be the truth, or me name ain't Cap'n!", "Now hoist the sails, matey!",
    "Fair winds to ye!", "Savvy?", "So says the cap'n!", "Arr!", "Now fetch me the rum!",
    "I swear it by Davy Jones' locker!", "That be worth a chest o' doubloons!", "Aye, that be so, me hearty!",
    "Tell it to yer crew, arr!", "Mark me words, ye scurvy dog!", "An' that be no sailor's yarn!",
)  # fmt: skip


def as_pirate(text: str, rng: random.Random) -> str:
    """The answer `text` as a pirate gives it. Draws an opener and a closer from `rng`."""
    text = re.sub(r"\bNo,", "Nay,", text)
    translated = re.sub(r"[A-Za-z']+", lambda match: _word(match[0]), text)
    return f"{rng.choice(_OPENERS)} {translated} {rng.choice(_CLOSERS)}"


def _word(word: str) -> str:
    lower = word.lower()
    new = _WORDS.get(lower)
    if new is None and lower.endswith("ing") and len(lower) > 5 and lower not in _KEPT_ING:
        new = lower[:-1] + "'"
    if new is None:
        return word
    return new[:1].upper() + new[1:] if word[0].isupper() and word != "I" else new
