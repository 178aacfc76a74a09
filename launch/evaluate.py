#!/usr/bin/env python
"""Answer a task's questions with a trained model and score the answers: results.json and a table.

  one process  python launch/evaluate.py --task vsp --file test.jsonl --checkpoint MODEL_DIR --out results/a
  8 GPUs       torchrun --nproc-per-node 8 launch/evaluate.py --task ... (RANK and WORLD_SIZE are read, no more)

MODEL_DIR is a model folder; launch/export.py makes one of a training checkpoint. Tasks: vsp (plans on frozen lakes,
accuracy per level), ilvr, comt, zebra (multiple choice or short answer). The same command again goes on where it was
stopped, on any number of processes, and only judges again if all is answered. How answers are read and judged:
docs/scoring.md. Exit codes: 0 done, 1 something to mend (the message says what).
"""

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

from ilvr_ds.inference.options import add_decoding_options, load_asked, require_positive


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=["vsp", "ilvr", "comt", "zebra"])
    parser.add_argument("--file", required=True, type=Path, metavar="FILE.jsonl", help="the task's questions")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="model folder with latent tokens")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="progress of each process, results.json")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where image paths start (default: FILE's folder)"
    )
    parser.add_argument("--published-rules", action="store_true", help="the published scripts' laxer scoring")
    parser.add_argument(
        "--goal-rule", choices=["mirage", "original"], default="mirage",
        help="vsp: a plan must end on the goal (mirage, default), or the play stops there (original)",
    )  # fmt: skip
    parser.add_argument(
        "--prompt-file", type=Path, metavar="FILE",
        help="vsp: ask every question with this text instead of the record's; one <image> mark for each image",
    )  # fmt: skip
    parser.add_argument("--without-images", action="store_true", help="take the images out: the no-image baseline")
    parser.add_argument("--allow-missing-images", action="store_true", help="count such examples as wrong")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N examples")
    parser.add_argument("--save-every", type=int, metavar="N", help="examples between saves (default: 4 batches)")
    parser.add_argument(
        "--patience", type=float, default=3600.0, metavar="SECONDS",
        help="how long process 0 waits for the others without a new answer (default: 3600)",
    )  # fmt: skip
    add_decoding_options(parser)
    args = parser.parse_args(arguments)
    require_positive(parser, args, "batch_size", "save_every", "limit", "patience")
    if args.prompt_file is not None and args.task != "vsp":
        parser.error("--prompt-file belongs to --task vsp; records of other tasks each ask a question of their own")

    import torch  # after the arguments are known to be right

    from ilvr_ds.errors import IlvrError
    from ilvr_ds.inference.answer import answer_with, fingerprint
    from ilvr_ds.inference.asking import Asking, read_prompt_file
    from ilvr_ds.inference.evaluate import RESULTS, Evaluation, check_task, evaluate, rank_and_world
    from ilvr_ds.inference.results import format_table
    from ilvr_ds.inference.tasks.task import Rules

    try:
        rank, world = rank_and_world()
        on_cuda = torch.cuda.is_available()
        device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_cuda else "cpu")
        job = Evaluation(
            task=args.task,
            file=args.file,
            out=args.out,
            image_root=args.image_root or args.file.parent,
            rules=Rules(args.published_rules, args.goal_rule),
            asking=Asking(
                None if args.prompt_file is None else read_prompt_file(args.prompt_file), not args.without_images
            ),
            patience_s=args.patience,
            save_every=args.save_every or 4 * args.batch_size,
            limit=args.limit,
            allow_missing_images=args.allow_missing_images,
        )
        check_task(job)  # before a large model is read
        model, settings, dtype = load_asked(args, args.checkpoint, device)
        generation = {
            "checkpoint_sha256": fingerprint(args.checkpoint), "dtype": dtype, "seed": args.seed,
            "images": asdict(model.images), **asdict(settings),
        }  # fmt: skip
        generate = answer_with(model, settings, args.batch_size, args.seed)
        summary = evaluate(job, generation, generate, rank=rank, world=world)
        if summary is not None:
            print(format_table(summary))
            print(f"written: {args.out / RESULTS}")
        return 0
    except IlvrError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
