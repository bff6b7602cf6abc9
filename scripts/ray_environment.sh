#!/usr/bin/env bash
# Makes the environment in which specproxy runs under Ray Serve: scripts/ray_environment.sh [folder], .venv-ray by default.
# Ray brings some forty packages that nothing else here needs, hence an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-ray}

"${PYTHON:-python3.11}" -m venv "$folder"
"$folder/bin/pip" install -q -c constraints.txt -e '.[ray]' 'ray[serve]==2.60.0' pytest httpx
"$folder/bin/python" -c "import ray; print('Ray', ray.__version__)"
