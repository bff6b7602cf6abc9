"""`python -m specproxy`: the command line. Knows nothing else."""

import sys

from specproxy.cli import main

if __name__ == "__main__":
    sys.exit(main())
