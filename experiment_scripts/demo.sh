#!/usr/bin/env bash
# The whole path on built-in data, without a download: CxGrad meta-trains 5-way 1-shot on drawn characters, is
# meta-tested on scripts it has never seen, then on real handwritten digits and on the same scripts in colour.
# Expected accuracy: at least 70 % on unseen scripts. Time: a few minutes on 2 CPU cores; not measured on GPU.
#   make demo
#   bash experiment_scripts/demo.sh 0
source "$(dirname "${BASH_SOURCE[0]}")/run.sh"
check_gpu_id "$@"
find_python
export PYTHON=$python
[[ -z ${DATASET_DIR:-} ]] || DATASET_DIR=$(from_caller "$DATASET_DIR")
unset TEST TEST_DATASET TEST_BATCH_SIZE
script=experiment_scripts/glyphs_5way_1shot/CxGrad_4conv.sh
# A dry run cross-tests by itself and leaves nothing to report.
[[ ! " $* " =~ \ --dry[-_]run(\ --|[\ =][Tt]rue|\ $) ]] || exec bash "$script" "$@"

"$python" preprocess/preprocess.py --datasets glyphs digits glyphs_colour ${DATASET_DIR:+--dataset_dir "$DATASET_DIR"}
bash "$script" "$@"
TEST=1 TEST_DATASET=digits,glyphs_colour bash "$script" "$@"
"$python" utils/report.py experiments/glyphs_5way_1shot/CxGrad_4conv
