#!/usr/bin/env python
"""Our strict verdicts against the upstream verdicts on 1,000 real model outputs; prints JSON.

    python tests/golden/scoring_agreement.py ../shared/realdata/scoring/answers.jsonl [--list]

Per benchmark, boxed and unboxed outputs apart: outputs, equal verdicts, and each disagreement that
docs/scoring.md does not explain ("unexplained"; exit 1 if there is one). `--list` prints all disagreements.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_ds.inference.scoring.choices import choose, reference_letter
from ilvr_ds.inference.scoring.matching import same_answer, short_answer

DOCS = Path(__file__).resolve().parents[2] / "docs/scoring.md"

# The file lists no options for BLINK; these sub-tasks have the same ones in every question (Counting has not).
_POINTS = ("Point A", "Point B", "Point C", "Point D")
_IMAGES = ("the second image", "the third image")
BLINK_OPTIONS = {
    "Visual_Correspondence": _POINTS,
    "Semantic_Correspondence": _POINTS,
    "Functional_Correspondence": _POINTS,
    "Object_Localization": ("Box A", "Box B"),
    "Relative_Depth": ("A is closer", "B is closer"),
    "Relative_Reflectance": ("A is darker", "B is darker", "About the same"),
    "Spatial_Relation": ("yes", "no"),
    "Art_Style": _IMAGES,
    "Visual_Similarity": _IMAGES,
    "Jigsaw": _IMAGES,
    "Multi-view_Reasoning": ("left", "right"),
    "IQ_Test": ("picture A", "picture B", "picture C", "picture D"),
    "Forensic_Detection": ("the first image", "the second image", "the third image", "the fourth image"),
}


def judge(line: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Our verdict, and what we read as the answer."""
    if line["kind"] == "Open-ended":
        value = short_answer(line["output"]).value
        return value is not None and same_answer(value, line["answer"]), value
    texts = line["choices"]
    if line["benchmark"] == "blink":
        texts = BLINK_OPTIONS.get(re.sub(r"^val_(.*)_\d+$", r"\1", line["id"]), ())
    options = {chr(ord("A") + i): text for i, text in enumerate(texts)}
    letter = choose(line["output"], options).letter
    return letter is not None and letter == reference_letter(line["answer"], options), letter


def agreement(lines: list[dict[str, Any]], explained: set[str]) -> dict[str, Any]:
    """Counts per benchmark and kind of output, and the disagreements."""
    report: dict[str, Any] = {}
    for line in lines:
        kind = "boxed" if "\\boxed" in line["output"] else "unboxed"
        part = report.setdefault(
            f"{line['benchmark']} {kind}",
            {"outputs": 0, "equal": 0, "agreement": 0.0, "disagreements": [], "unexplained": []},
        )
        correct, read = judge(line)
        part["outputs"] += 1
        part["equal"] += correct == line["upstream_correct"]
        part["agreement"] = part["equal"] / part["outputs"]
        if correct != line["upstream_correct"]:
            name = f"{line['id']} {line['model']}"
            part["disagreements"].append(
                {"id": name, "answer": line["answer"], "ours": read, "upstream": line["upstream_extraction"]}
            )
            if line["id"] not in explained:
                part["unexplained"].append(name)
    return dict(sorted(report.items()))


def explained_ids() -> set[str]:
    """Ids that docs/scoring.md names."""
    return set(re.findall(r"`([\w-]+_\d+)`", DOCS.read_text(encoding="utf-8")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, metavar="answers.jsonl")
    parser.add_argument("--list", action="store_true", help="print every disagreement, not only the unexplained ones")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.answers.read_text(encoding="utf-8").splitlines()]
    report = agreement(lines, explained_ids())
    if not args.list:
        for part in report.values():
            part["disagreements"] = len(part["disagreements"])
    print(json.dumps(report, indent=1))
    return 1 if any(part["unexplained"] for part in report.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
