# What all experiment scripts share; they source it, fill the array `row` with their options, and call run_row "$@".
# any.sh sources it before the script whose row it takes, which must not source it again.
# Everything that the environment can say is read here and nowhere else:
#   TEST=1           meta-test the row's checkpoints instead of training
#   TEST_DATASET     data set, or several joined by commas, to meta-test on (default: the row's own)
#   TEST_BATCH_SIZE  tasks in a test meta-batch
#   DATASET_DIR      folder that holds the data sets (default: datasets/ of the repository)
#   PYTHON           interpreter (default: the active virtual or conda environment's, else .venv's, else python3)
! declare -F run_row >/dev/null || return 0
set -euo pipefail

caller=$PWD
words_before_gpu=
CDPATH="" cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

fail() {
  printf '%s\n' "$@" >&2
  exit 2
}

# A path given on the command line, as seen from where the user stood.
from_caller() {
  case $1 in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$caller/$1" ;;
  esac
}

check_gpu_id() {
  [[ ${1-} =~ ^(cpu|[0-9]+(,[0-9]+)*)$ ]] && return
  local script=experiment_scripts/${0##*experiment_scripts/}
  [[ $0 == *experiment_scripts/* ]] || script=$0
  script+=$words_before_gpu
  fail "usage: bash $script GPU_ID [--option value …]" \
    "GPU_ID is cpu, a number, or numbers joined by commas${1:+, not \"$1\"}. Examples:" \
    "  bash $script 0" \
    "  bash $script 0,1" \
    "  bash $script cpu --total_epochs 2" \
    "  TEST=1 TEST_DATASET=CUB bash $script 0"
}

# An environment is often active without anybody having asked for it (conda's base); say so before Python's traceback.
find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    [[ $PYTHON != */* ]] || PYTHON=$(from_caller "$PYTHON")
    command -v -- "$PYTHON" >/dev/null || fail "PYTHON is '$PYTHON', which is no program here."
    python=$PYTHON
    return
  fi
  # A virtual environment is activated inside a conda one far more often than the other way round.
  for python in ${VIRTUAL_ENV:+"$VIRTUAL_ENV/bin/python"} ${CONDA_PREFIX:+"$CONDA_PREFIX/bin/python"} \
    "$PWD/.venv/bin/python" python3; do
    ! command -v -- "$python" >/dev/null || break
  done
  "$python" -c 'from importlib.util import find_spec; raise SystemExit(find_spec("torch") is None)' ||
    fail "$python has no torch. Install requirements.txt there; or leave that environment (deactivate," \
      "conda deactivate) and let 'make test' set up .venv; or name another interpreter with PYTHON=…"
}

# Replaces this shell, so that Ctrl-C and SIGTERM reach the training itself.
run_row() {
  check_gpu_id "$@"
  local gpu=$1 python
  shift
  find_python
  [[ -z ${TEST_DATASET:-} ]] || row+=(--test_datasets "$TEST_DATASET")
  [[ -z ${TEST_BATCH_SIZE:-} ]] || row+=(--test_batch_size "$TEST_BATCH_SIZE")
  [[ -z ${DATASET_DIR:-} ]] || row+=(--dataset_dir "$(from_caller "$DATASET_DIR")")
  case ${TEST:-0} in
    0) ;;
    1) row+=(--evaluate_on_test_set_only true) ;;
    *) fail "TEST is '$TEST'; it is 1 to meta-test, or not set." ;;
  esac
  row=(--gpu "$gpu" --experiment_name "$(basename -- "$0" .sh)" "${row[@]}")
  exec "$python" train_maml_system.py "${row[@]}" "$@"
}
