"""Plans of moves, read from end to end: every word of the text must belong to the plan, else there is no plan.

Read as moves: `DLLU`, `D, L, L, U`, `D -> L -> L -> U`, `down left left up`, `['DOWN', 'LEFT']`, `d, l`,
`\\text{D L}`, `down, then left and up`. Not read: `DLLUX`, `D JUMP L`, `The route goes down and left.`, `dull`
(letters written together count in capitals only), `2 x down`.
"""

from __future__ import annotations

import re

from ilvr_ds.data.frozenlake import MOVES
from ilvr_ds.inference.scoring.extract import extract, trim

_WORDS = {"down": "D", "left": "L", "right": "R", "up": "U"}
_SEPARATOR = re.compile(r"(?:[\s,;.\-–—>→'\"\[\]()|/]|\\(?:rightarrow|to)\b|\\[,; ]|\b(?:and|then)\b)+", re.IGNORECASE)


def parse_path(text: str) -> str | None:
    """A text that is a plan and nothing else, as letters of `MOVES`; None otherwise.

    >>> parse_path("down, left -> L and U")
    'DLLU'
    >>> parse_path("go down") is None
    True
    """
    start, end = trim(text, 0, len(text))
    moves = []
    for word in _SEPARATOR.split(text[start:end]):
        if word == "":
            continue
        if word.casefold() in _WORDS:
            moves.append(_WORDS[word.casefold()])
        elif set(word) <= MOVES.keys() or (len(word) == 1 and word.upper() in MOVES):
            moves.append(word.upper())
        else:
            return None
    return "".join(moves) or None


def extract_path(output: str) -> str | None:
    """The plan an output gives as its answer (rules of `extract`); None if it gives none or it is no plan.

    >>> extract_path("try L.\\nFinal answer: DLLU<|im_end|>")
    'DLLU'
    >>> extract_path("\\\\boxed{D JUMP LLU}") is None
    True
    """
    found = extract(output)
    return None if found.value is None else parse_path(found.value)
