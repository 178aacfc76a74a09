#!/usr/bin/env bash
# From nothing to a model that solves puzzles it has never seen: stage 1, a stop and an exact resume, stage 2,
# decoding, scoring and one picture, on two CPU ranks. No download of data or weights; under eight minutes after
# installation. Run it again: data and models that are there are kept, the runs start anew.
#   ILVR_QUICKSTART_DIR   where everything goes (default runs/quickstart)
#   ILVR_REALDATA         folder with vsp_planning_test/test.jsonl, the official 400 maps (default ../shared/realdata);
#                         without it 100 maps of our own are held out
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
START=$(date +%s)
source launch/setup_env.sh puzzles,report

DIR="${ILVR_QUICKSTART_DIR:-runs/quickstart}"
OFFICIAL="${ILVR_REALDATA:-../shared/realdata}/vsp_planning_test/test.jsonl"
# Two CPU ranks everywhere, so that what you see does not depend on the machine.
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
say() { printf '\n[%3ds] %s\n' "$(($(date +%s) - INSTALLED))" "$*"; }
INSTALLED=$(date +%s)
echo "quickstart: set-up took $((INSTALLED - START)) s; everything goes to $DIR"
rm -rf "$DIR/stage1" "$DIR/resumed" "$DIR/stage2" "$DIR/stage1_model" "$DIR/student" "$DIR/results"

say "1/9 a tiny Qwen2.5-VL model and its tokenizer -> $DIR/model"
python launch/make_tiny_model.py --out "$DIR/model" --seed 0

say "2/9 FrozenLake puzzles, some held out, with a helper image every two moves -> $DIR/puzzles, $DIR/test"
STYLE=(--wording brief --cell 28) # a cell of the lake is one visual token
if [ -f "$OFFICIAL" ]; then
    echo "test: the maps of $OFFICIAL, asked in the puzzles' words"
    python data_tools/make_frozenlake.py --out "$DIR/test" --maps "$OFFICIAL" "${STYLE[@]}"
else
    echo "test: 100 held-out maps ($OFFICIAL is not there)"
    python data_tools/make_frozenlake.py --out "$DIR/test" --count 100 --sizes 3 4 5 6 --seed 1 "${STYLE[@]}"
fi
python data_tools/make_frozenlake.py --out "$DIR/puzzles" --count 6000 --sizes 3 4 5 6 --seed 0 "${STYLE[@]}" \
    --exclude "$DIR/test/records.jsonl"

say "3/9 webdataset shards: tokens counted, images ready to decode -> $DIR/shards"
python data_tools/build_shards.py --input "$DIR/puzzles/records.jsonl" --format ilvr --tokenizer "$DIR/model" \
    --out "$DIR/shards" --samples-per-shard 1000 --workers 2
python data_tools/check_shards.py "$DIR/shards" --tokenizer "$DIR/model" --workers 2

train() {
    recipe=$1
    shift
    deepspeed --num_gpus 2 launch/train.py --recipe "launch/recipes/$recipe.yaml" data.shards="$DIR/shards" "$@"
}
say "4/9 stage 1: latents aligned with what the teacher selects; two ranks, ZeRO-3 -> $DIR/stage1"
train tiny_frozenlake model.path="$DIR/model" run.dir="$DIR/stage1"

say "5/9 the same run as if the machine had gone down at its last checkpoint but one, started again -> $DIR/resumed"
cp -r "$DIR/stage1" "$DIR/resumed"
rm -r "$(ls -d "$DIR"/resumed/checkpoints/step-* | sort | tail -n 1)"
train tiny_frozenlake model.path="$DIR/model" run.dir="$DIR/resumed"
python launch/compare_runs.py "$DIR/stage1" "$DIR/resumed"

say "6/9 stage 2: latents are the student's own hidden states, cross-entropy through the whole chain -> $DIR/stage2"
python launch/export.py --run "$DIR/stage1" --out "$DIR/stage1_model"
train tiny_frozenlake_stage2 model.path="$DIR/stage1_model" run.dir="$DIR/stage2"

say "7/9 the trained model as a folder stock transformers loads; three unseen puzzles decoded -> $DIR/student"
python launch/export.py --run "$DIR/stage2" --out "$DIR/student"
head -n 3 "$DIR/test/records.jsonl" >"$DIR/test/first_three.jsonl"
python launch/generate.py --model "$DIR/student" --input "$DIR/test/first_three.jsonl" --max-new-tokens 160

say "8/9 all test puzzles, answered by the trained and by the untrained model -> $DIR/results"
answer() {
    OMP_NUM_THREADS=2 python launch/evaluate.py --task vsp --file "$DIR/test/records.jsonl" --checkpoint "$1" \
        --out "$DIR/results/$2" --batch-size 100 --max-new-tokens 120
}
answer "$DIR/student" trained
answer "$DIR/model" untrained

say "9/9 did it learn? -> $DIR/report.png"
python launch/report.py --results trained="$DIR/results/trained" untrained="$DIR/results/untrained" \
    --training-maps "$DIR/puzzles/records.jsonl" --test-maps "$DIR/test/records.jsonl" \
    --runs "stage 1"="$DIR/stage1" "stage 2"="$DIR/stage2" --plot "$DIR/report.png"
say "done. Next: README.md, 'Train on your own data'"
