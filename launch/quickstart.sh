#!/usr/bin/env bash
# From nothing to a trained, stopped and resumed ILVR stage-1 run on two CPU ranks. No download of data
# or weights; a few minutes after installation. Run it again: finished parts are kept, the runs start anew.
#   ILVR_QUICKSTART_DIR   where everything goes (default runs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
START=$(date +%s)
source launch/setup_env.sh puzzles,report

DIR="${ILVR_QUICKSTART_DIR:-runs/quickstart}"
# Two CPU ranks everywhere, so that what you see does not depend on the machine.
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
say() { printf '\n[%3ds] %s\n' "$(($(date +%s) - INSTALLED))" "$*"; }
INSTALLED=$(date +%s)
echo "quickstart: set-up took $((INSTALLED - START)) s; everything goes to $DIR"

say "1/7 a tiny Qwen2.5-VL model and its tokenizer -> $DIR/model"
python launch/make_tiny_model.py --out "$DIR/model" --seed 0

say "2/7 FrozenLake puzzles with a helper image every few moves -> $DIR/puzzles"
python data_tools/make_frozenlake.py --out "$DIR/puzzles" --count 480 --sizes 3 4 --seed 0

say "3/7 webdataset shards, images resized once and for all (to 112x112 here) -> $DIR/shards"
python data_tools/build_shards.py --input "$DIR/puzzles/records.jsonl" --format ilvr --tokenizer "$DIR/model" \
    --out "$DIR/shards" --samples-per-shard 160 --input-max-pixels 12544 --helper-max-pixels 12544
python data_tools/check_shards.py "$DIR/shards" --tokenizer "$DIR/model"

train() {
    deepspeed --num_gpus 2 launch/train.py --recipe launch/recipes/tiny_frozenlake.yaml \
        data.shards="$DIR/shards" model.path="$DIR/model" "$@"
}
rm -rf "$DIR/full" "$DIR/resumed"
say "4/7 train: two ranks, ZeRO-3, fp32 EMA teacher -> $DIR/full"
train run.dir="$DIR/full"

say "5/7 the same run, stopped after 30 steps ... -> $DIR/resumed"
train run.dir="$DIR/resumed" run.stop_after=30
say "    ... and resumed from its checkpoint"
train run.dir="$DIR/resumed"

say "6/7 did the loss fall, did the teacher move, is the resumed run the uninterrupted one?"
python launch/compare_runs.py "$DIR/full" "$DIR/resumed" --plot "$DIR/curves.png"
say "7/7 the trained model as a folder stock transformers loads, and three new puzzles decoded -> $DIR/student"
rm -rf "$DIR/student"
python launch/export.py --run "$DIR/full" --out "$DIR/student"
python data_tools/make_frozenlake.py --out "$DIR/new_puzzles" --count 3 --sizes 3 4 --seed 1 \
    --exclude "$DIR/puzzles/records.jsonl"
python launch/generate.py --model "$DIR/student" --input "$DIR/new_puzzles/records.jsonl" \
    --max-new-tokens 160
echo "(75 steps teach the format, latent spans included, not yet the planning)"
say "done. Next: README.md, 'Train on your own data'"
