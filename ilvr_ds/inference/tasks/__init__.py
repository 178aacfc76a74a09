"""Tasks: a kind of test file, how it is read and how an output is judged."""

from __future__ import annotations

from typing import Literal

from ilvr_ds.inference.tasks.comt_questions import ComtQuestions
from ilvr_ds.inference.tasks.ilvr_questions import IlvrQuestions
from ilvr_ds.inference.tasks.task import Task
from ilvr_ds.inference.tasks.vsp_planning import VspPlanning
from ilvr_ds.inference.tasks.zebra_questions import ZebraQuestions

TaskName = Literal["vsp", "ilvr", "comt", "zebra"]


def task_named(name: TaskName) -> Task:
    """The task of a name."""
    match name:
        case "vsp":
            return VspPlanning()
        case "ilvr":
            return IlvrQuestions()
        case "comt":
            return ComtQuestions()
        case "zebra":
            return ZebraQuestions()
