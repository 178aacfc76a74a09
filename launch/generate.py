#!/usr/bin/env python
"""Answer prompts with a trained model: text with latent spans in between.

  records     python launch/generate.py --model MODEL_DIR --input records.jsonl --out answers.jsonl
  one prompt  python launch/generate.py --model MODEL_DIR --prompt "Which exit? <image>" --image maze.png

Without --out the answers are printed, each latent span as ⟦8 latents⟧. Greedy unless --temperature is given. A
prompt's answer does not depend on the batch size or on the other prompts. Exit codes: 0 done, 1 something to mend
(the message says what).
"""

import argparse
import json
import os
import sys
from pathlib import Path

from ilvr_ds.inference.options import add_decoding_options, load_asked, require_positive


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder with latent tokens")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, metavar="FILE.jsonl", help="ILVR records; only their prompts are read")
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; <image> marks where the images go")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="an image of --prompt; repeatable")
    parser.add_argument(
        "--image-root", type=Path, metavar="DIR", help="where paths in --input start (default: its folder)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="write the answers here, one JSON object a line")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    add_decoding_options(parser)
    args = parser.parse_args(arguments)
    if args.image and args.prompt is None:
        parser.error("--image belongs to --prompt; records of --input name their own images")
    require_positive(parser, args, "batch_size", "limit")

    import torch  # after the arguments are known to be right
    from tqdm import tqdm

    from ilvr_ds.errors import IlvrError
    from ilvr_ds.inference.requests import encode_requests, read_requests, typed_request

    try:
        if args.input is None:
            requests = [typed_request(args.prompt, args.image)]
        else:
            requests = read_requests(args.input, args.image_root)[: args.limit]
        device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, settings, _ = load_asked(args, args.model, device)
        prompts = encode_requests(requests, model.tokenizer, model.images, args.seed)
        answers = [None] * len(requests)
        stream = model.decoder.stream(prompts, settings, args.batch_size)
        for number, answer in tqdm(stream, total=len(requests), unit="prompt", desc="generating", file=sys.stderr):
            answers[number] = answer
        if args.out is None:
            for answer in answers:
                print(f"[{answer.id}] {answer.display}" + (" … (max_new_tokens)" if answer.unterminated else ""))
        else:
            _write(args.out, answers)
        print(_summary(answers), file=sys.stderr)
        return 0
    except IlvrError as error:
        print(f"generate: {error}", file=sys.stderr)
        return 1


def _write(out: Path, answers: list) -> None:
    """All lines or no file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        for answer in answers:
            line = {
                "id": answer.id, "text": answer.text, "display": answer.display, "tokens": answer.tokens,
                "span_lengths": answer.span_lengths, "spans_skipped": answer.spans_skipped, "end": answer.end,
            }  # fmt: skip
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(partial, out)


def _summary(answers: list) -> str:
    return (
        f"{len(answers)} answers, {sum(len(a.tokens) for a in answers)} tokens, "
        f"{sum(a.spans_opened for a in answers)} spans, {sum(a.spans_skipped for a in answers)} spans skipped, "
        f"{sum(a.unterminated for a in answers)} unterminated"
    )


if __name__ == "__main__":
    sys.exit(main())
