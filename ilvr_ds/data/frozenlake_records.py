"""FrozenLake puzzles as interleaved-reasoning records: prompt, reasoning with helper pictures, answer.

The assistant turn states start and goal, then walks the plan in chunks of a few moves: text, and after it a
helper picture of the lake with the elf where the chunk ends. The last chunk has its picture too (the elf at
the gift), so every record has ceil(moves / moves_per_helper) >= 1 latent spans. Two wordings:

    sentences  the rules in the prompt, a sentence per chunk in one of a few phrasings: for models that can read
    brief      no rules; cells as on a chessboard, column letter and row number, from the top left:
               "Elf b1, gift a3. D b2 L a2". Half the tokens: for a tiny model that learns all it knows here

Phrasings are drawn from (seed, index), so records are a pure function of the map, the seed, the index and the wording.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ilvr_ds.data.frozenlake import (
    GOAL,
    START,
    MapDesc,
    MapSpec,
    Position,
    find_cell,
    make_maps,
    shortest_plan,
    simulate,
)
from ilvr_ds.errors import PuzzleError

Wording = Literal["sentences", "brief"]

IMAGES_PER_FOLDER = 1000  # records whose pictures share a folder

PROMPT = (
    "<image>\n"
    "This is a frozen lake seen from above. The elf must walk to the gift without stepping into a hole. "
    "One move goes to the next cell: L is left, R is right, U is up, D is down. A move over the edge does nothing.\n"
    "Find a shortest safe plan. Write it in \\boxed{} as letters with commas between them."
)
BRIEF_PROMPT = "<image>\nFind a shortest safe plan for the elf."
_OPENINGS = (
    "The elf starts at {start} and the gift is at {goal}.",
    "Start: {start}. Gift: {goal}.",
    "I see the elf at {start}. The gift waits at {goal}.",
)
_CHUNKS = (
    " Going {words} leads to {there}.",
    " From {here} I go {words} and reach {there}.",
    " Next {words}: now the elf is at {there}.",
)
_WORDS = {"L": "left", "R": "right", "U": "up", "D": "down"}


@dataclass(frozen=True)
class Frame:
    """One picture of a record: draw it with `frozenlake_render.render(map, position, last_move)`."""

    path: str  # relative to the JSONL file, with forward slashes
    position: Position  # where the elf stands
    last_move: str | None  # which way it faces; None before the first move


@dataclass(frozen=True)
class PuzzleRecord:
    """A record in ILVR's JSONL schema and the pictures it points to, the input picture first."""

    fields: dict[str, Any]
    frames: tuple[Frame, ...]


def puzzle_record(
    map_desc: MapDesc, seed: int, index: int, moves_per_helper: int, wording: Wording = "sentences"
) -> PuzzleRecord:
    """The record of one map. Its answer is `shortest_plan(map_desc)`.

    Raises `PuzzleError` if the map has no safe plan or `moves_per_helper` is below 1.
    """
    if moves_per_helper < 1:
        raise PuzzleError(f"moves_per_helper: got {moves_per_helper}; allowed: 1 or more")
    rng = random.Random(f"frozenlake text {seed} {index}")
    name = f"frozenlake-{seed}-{index:06d}"
    folder = f"images/{index // IMAGES_PER_FOLDER:04d}"
    plan = shortest_plan(map_desc)
    positions = simulate(map_desc, plan).positions
    frames = [Frame(f"{folder}/{name}-map.png", positions[0], None)]
    steps: list[dict[str, str]] = []
    start, goal = find_cell(map_desc, START), find_cell(map_desc, GOAL)
    if wording == "brief":
        text = f"Elf {_square(start)}, gift {_square(goal)}."
    else:
        text = _pick(rng, _OPENINGS).format(start=_words_of(start), goal=_words_of(goal))
    for first in range(0, len(plan), moves_per_helper):
        chunk = plan[first : first + moves_per_helper]
        last = first + len(chunk)
        if wording == "brief":
            text += "".join(f" {plan[i]} {_square(positions[i + 1])}" for i in range(first, last))
        else:
            text += _pick(rng, _CHUNKS).format(
                words=", ".join(_WORDS[move] for move in chunk),
                here=_words_of(positions[first]),
                there=_words_of(positions[last]),
            )
        frames.append(Frame(f"{folder}/{name}-step{last:02d}.png", positions[last], chunk[-1]))
        steps.append({"type": "text", "content": text.strip()})
        steps.append({"type": "latent", "helper_image": frames[-1].path})
        text = ""
    answer = ",".join(plan)
    steps.append({"type": "text", "content": f"The final answer is: \\boxed{{{answer}}}"})
    fields = {
        "id": name,
        "text_input": BRIEF_PROMPT if wording == "brief" else PROMPT,
        "image_input": [frames[0].path],
        "sequence_plan": steps,
        "original_final_answer": answer,
        "map_desc": [list(row) for row in map_desc],
    }
    return PuzzleRecord(fields, tuple(frames))


def example_texts(count: int, seed: int = 0) -> list[str]:
    """Every text of `count` made-up puzzles, in both wordings, to learn a tokenizer from; no pictures."""
    spec = MapSpec(sizes=(3, 4, 5, 6), hole_rate=(0.2, 0.35), seed=seed)
    texts = []
    for index, map_desc in enumerate(make_maps(spec, count)):
        for wording in get_args(Wording):
            fields = puzzle_record(map_desc, seed, index, 2, wording).fields
            texts.append(fields["text_input"])
            texts.extend(step["content"] for step in fields["sequence_plan"] if step["type"] == "text")
    return texts


def _pick(rng: random.Random, phrases: tuple[str, ...]) -> str:
    return phrases[int(rng.random() * len(phrases))]  # random() keeps its values across Python versions


def _words_of(position: Position) -> str:
    return f"row {position[0] + 1}, column {position[1] + 1}"


def _square(position: Position) -> str:
    return f"{chr(ord('a') + position[1])}{position[0] + 1}"
