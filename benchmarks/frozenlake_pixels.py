"""Claim: rendered FrozenLake maps look like the VSP spatial-planning test set (target: at most 2 of 255).

    python benchmarks/frozenlake_pixels.py [--data FOLDER]

Renders the `map_desc` of every record and compares it with the record's image. Prints JSON: the mean
absolute pixel difference (0 to 255, over all pixels and channels) overall and per map size, and the
largest single difference. Exits 1 above the target.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ilvr_ds.data.frozenlake import parse_map
from ilvr_ds.data.frozenlake_render import render
from ilvr_ds.errors import IlvrError

TARGET = 2.0
REPOSITORY = Path(__file__).resolve().parent.parent


def measure(folder: Path) -> dict:
    """Compare every record of `folder`/test.jsonl; returns what the script prints."""
    differences: dict[int, list[np.ndarray]] = {}
    for line in (folder / "test.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        with Image.open(folder / record["image_input"]) as image:
            real = np.asarray(image.convert("RGB"), dtype=np.int16)
        made = render(parse_map(record["map_desc"])).astype(np.int16)
        if made.shape != real.shape:
            raise SystemExit(f"{record['image_input']}: {real.shape} pixels, rendered {made.shape}")
        differences.setdefault(len(record["map_desc"]), []).append(np.abs(real - made))
    every = [difference for group in differences.values() for difference in group]
    return {
        "benchmark": "frozenlake_pixels",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "images": len(every),
        "mean_absolute_difference": float(np.mean([d.mean() for d in every])),
        "largest_difference": int(max(d.max() for d in every)),
        "per_level": {
            str(size): {"images": len(group), "mean_absolute_difference": float(np.mean([d.mean() for d in group]))}
            for size, group in sorted(differences.items())
        },
        "target": TARGET,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("ILVR_REALDATA", REPOSITORY.parent / "shared" / "realdata")) / "vsp_planning_test"
    parser.add_argument("--data", type=Path, default=default, help="folder with test.jsonl (default: %(default)s)")
    data = parser.parse_args().data
    if not (data / "test.jsonl").is_file():
        print(f"error: {data / 'test.jsonl'} not found; point --data or ILVR_REALDATA at the test set", file=sys.stderr)
        return 1
    try:
        result = measure(data)
    except IlvrError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result, indent=2))
    return 0 if result["mean_absolute_difference"] <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
