"""What of a record's assistant turn is trained on: all of it, its text, or its answer. Controls of the method.

interleaved   text and helper images, as written: the method
text          the text, helper images left out: reasoning in words only
answer        the final answer sentence alone: direct answering
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from ilvr_ds.contracts import ImageRef, Record
from ilvr_ds.errors import RecordError

AssistantView = Literal["interleaved", "text", "answer"]
ASSISTANT_VIEWS: tuple[AssistantView, ...] = ("interleaved", "text", "answer")


def assistant_view(record: Record, view: AssistantView) -> Record:
    """The record with the assistant turn that `view` asks for; everything else, the answer included, is kept.

    `text`: the text steps in order, as one text. Where helper images stood between two texts that have no white space
    at their seam, one space takes their place: "Right.<image>Then down." becomes "Right. Then down.".
    `answer`: the last step, which must be a text (the answer sentence follows the last helper image), without white
    space around it. If it has several paragraphs (blank lines between them), the last one: what comes before is
    reasoning. Nothing is made up from `Record.answer`: what is learnt is what the record says.

    Raises:
        RecordError: no_text (`text` of a record of helper images only); no_final_answer (`answer` of a record that
            ends with a helper image or with an empty text).
    """
    if view == "interleaved":
        return record
    if view == "text":
        text = _text_only(record.steps)
        if not text.strip():
            raise _error(record, "no_text", "no text is left without the helper images")
        return replace(record, steps=(text,))
    last = record.steps[-1] if record.steps else ""
    if not isinstance(last, str):
        raise _error(record, "no_final_answer", f"the last step is the helper image {last.path!r}, not an answer")
    paragraphs = [part.strip() for part in last.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not paragraphs:
        raise _error(record, "no_final_answer", "the last step is an empty text")
    return replace(record, steps=(paragraphs[-1],))


def _text_only(steps: tuple[str | ImageRef, ...]) -> str:
    text, after_image = "", False
    for step in steps:
        if isinstance(step, ImageRef):
            after_image = True
        elif step:
            seam = after_image and text and not (text[-1].isspace() or step[0].isspace())
            text += f" {step}" if seam else step
            after_image = False
    return text


def _error(record: Record, reason: str, problem: str) -> RecordError:
    message = f"{problem}; repair the record or build with --assistant interleaved"
    return RecordError(reason, message, origin=record.origin, record_id=record.id, field="assistant turn")
