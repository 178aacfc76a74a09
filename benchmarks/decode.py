#!/usr/bin/env python
"""Tokens per second of batched latent decoding, by batch size, against one-at-a-time without a cache.

Three ways, the same prompts, the same number of new tokens, the same weights, alternating:

- "batch_N": this package's decoder, N sequences at once (N = 1 is single generation with a cache);
- "no_cache": one sequence at a time, the whole prefix run again for every token, as code without a cache that
  knows latents must do.

A random model seldom opens a span, so the head's row for `<|latent_start|>` is raised (see `open_spans`; 0 as
--span-share leaves it). Tokens are sampled with each sequence's own seed, and every way's tokens are compared with
"no_cache"'s. Rates include the prompts' own forward.

    python benchmarks/decode.py --model runs/quickstart/model --input runs/quickstart/puzzles/records.jsonl
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from ilvr_ds.inference.cache import DecodeCache
from ilvr_ds.inference.decode import Decoder
from ilvr_ds.inference.load import load_model
from ilvr_ds.inference.prompt import EncodedPrompt
from ilvr_ds.inference.requests import encode_requests, read_requests
from ilvr_ds.inference.sampling import Sampling, choose
from ilvr_ds.inference.sequence import DecodeSettings, SequenceState
from ilvr_ds.model.backbone import run_packed
from ilvr_ds.model.placement import place_image_features
from ilvr_ds.model.varlen_attention import Bounds


@torch.no_grad()
def without_cache(decoder: Decoder, prompt: EncodedPrompt, settings: DecodeSettings) -> list[int]:
    """Tokens of one sequence (no limit of spans); every step runs the whole sequence again."""
    backbone, vocabulary = decoder.backbone, decoder.tokens.vocabulary
    state = SequenceState(prompt.seed, prompt.next_position, settings, vocabulary)
    ids = torch.from_numpy(prompt.input_ids).to(backbone.device)
    places = (ids == vocabulary.image_pad).nonzero()[:, 0]
    inputs = backbone.embed(ids)  # (T, D), one row more each step
    if len(places):
        pixels = torch.from_numpy(prompt.pixels).to(backbone.device)
        inputs = place_image_features(inputs, places, backbone.encode_images(pixels, prompt.grids))
    positions = torch.from_numpy(prompt.position_ids).to(backbone.device)  # (3, T)
    while True:
        length = inputs.shape[0]
        cu = torch.tensor([0, length], dtype=torch.int32, device=inputs.device)
        rows = torch.cat([torch.arange(length, device=inputs.device)[None], positions])
        last = run_packed(backbone.language_model, inputs, rows, Bounds(cu, cu, length, length))[-1:]
        choice = None
        if state.wants_choice:
            logits = backbone.head.logits(last).float()
            logits[:, vocabulary.size :] = -torch.inf
            uniform = torch.tensor([state.uniform], device=logits.device)
            choice = int(choose(logits, settings.sampling, uniform))
        is_latent = state.advance(choice)
        if state.end is not None:
            return state.tokens
        new = last if is_latent else backbone.embed(torch.tensor(state.tokens[-1:], device=inputs.device))
        inputs = torch.cat([inputs, new])
        positions = torch.cat([positions, positions.new_full((3, 1), state.position)], dim=1)


class Measured:
    """One way of generating: seconds of each repetition, by the clock, and the tokens of the last."""

    def __init__(self, run: Callable[[], list[Sequence[int]]], clock: Callable[[], float]):
        self.run, self.clock = run, clock
        self.seconds: list[float] = []
        self.tokens: list[Sequence[int]] = []

    def repeat(self) -> None:
        begin = self.clock()
        self.tokens = self.run()
        self.seconds.append(self.clock() - begin)

    def report(self) -> dict:
        count = sum(len(tokens) for tokens in self.tokens)
        rates = sorted(count / s for s in self.seconds)
        return {"tokens": count, "tokens_per_s": statistics.median(rates), "min": rates[0], "max": rates[-1]}


@torch.no_grad()
def open_spans(decoder: Decoder, prompts: Sequence[EncodedPrompt], share: float) -> None:
    """Raise the head's row for `<|latent_start|>` so that a random model says it for about `share` of its tokens.

    The row becomes a multiple of the mean hidden state h of the prompts' last tokens, with the logit at h that
    gives it this share against the mean mass of the other tokens.
    """
    hidden = decoder.prefill(prompts, DecodeCache(len(decoder.backbone.language_model.layers))).float()  # (n, D)
    mean = hidden.mean(0)
    others = decoder.backbone.head.logits(hidden.to(decoder.backbone.head.weight.dtype)).float().logsumexp(1).mean()
    logit = others + torch.tensor(share / (1 - share)).log()
    row = mean * (logit / mean.square().sum())
    decoder.backbone.head.weight[decoder.tokens.vocabulary.latent_start] = row.to(decoder.backbone.head.weight.dtype)


def equal_share(tokens: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Share of sequences that are equal token for token."""
    return sum(list(a) == list(b) for a, b in zip(tokens, expected, strict=False)) / len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="model folder")
    parser.add_argument("--input", required=True, type=Path, help="ILVR records; at least as many as --prompts")
    parser.add_argument("--prompts", type=int, default=64, help="prompts of the largest batch")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--max-new-tokens", type=int, default=128, help="all sequences run to here (default: 128)")
    parser.add_argument("--repeat", type=int, default=3, help="measured repetitions, after one warm-up")
    parser.add_argument("--singles", type=int, default=4, help="prompts of the ways that run one at a time")
    parser.add_argument("--span-share", type=float, default=1 / 32, help="0 leaves the head as it is")
    parser.add_argument("--max-pixels", type=int, default=12544)
    parser.add_argument("--latent-size", type=int, help="default: what config.json says")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: for a busy machine, 1 thread")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = load_model(args.model, dtype=dtype, device=device, latent_size=args.latent_size, max_pixels=args.max_pixels)
    decoder = model.decoder
    prompts = list(encode_requests(read_requests(args.input)[: args.prompts], model.tokenizer, model.images, seed=0))
    if args.span_share:
        open_spans(decoder, prompts, args.span_share)
    # Temperature 1, or a random model says one token for ever; no stop token, so that batches stay as large as named.
    settings = DecodeSettings(model.latent_size, args.max_new_tokens, sampling=Sampling(1.0), stop_tokens=())

    def wall_clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    # One thread's own CPU seconds do not count what else a shared machine does; they are its seconds when quiet.
    clock = time.process_time if args.clock == "cpu" else wall_clock

    def batched(size: int) -> Measured:
        own = prompts[: max(size, args.singles)]
        return Measured(lambda: [g.tokens for g in decoder.generate(own, settings, size)], clock)

    ways = {f"batch_{size}": batched(size) for size in args.batch_sizes}
    ways["no_cache"] = Measured(lambda: [without_cache(decoder, p, settings) for p in prompts[: args.singles]], clock)
    for repetition in range(args.repeat + 1):
        for way in ways.values():
            way.repeat()
            if repetition == 0:
                way.seconds.clear()
    single = ways["no_cache"]
    report = {name: way.report() for name, way in ways.items()}
    for name, way in ways.items():
        report[name]["times_no_cache"] = report[name]["tokens_per_s"] / report["no_cache"]["tokens_per_s"]
        if "batch_1" in report:
            report[name]["times_batch_1"] = report[name]["tokens_per_s"] / report["batch_1"]["tokens_per_s"]
        report[name]["equal_to_no_cache"] = equal_share(way.tokens[: len(single.tokens)], single.tokens)
    spans = [list(tokens).count(model.tokenizer.vocabulary.latent_start) for tokens in max(
        (way.tokens for way in ways.values()), key=len)]  # fmt: skip
    result = {
        "model": str(args.model),
        "new_tokens_each": args.max_new_tokens,
        "prompt_tokens": [min(len(p.input_ids) for p in prompts), max(len(p.input_ids) for p in prompts)],
        "spans_per_sequence": sum(spans) / len(spans),
        "ways": report,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": args.threads,
        "clock": args.clock,
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
