#!/usr/bin/env bash
# Makes the environment of the load generator guidellm: scripts/guidellm_environment.sh [folder], .venv-guidellm by default.
# It pins an older click than constraints.txt; as a client it meets specproxy over HTTP alone.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-guidellm}

"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" install -q guidellm==0.8.1
"$folder/bin/guidellm" --version
