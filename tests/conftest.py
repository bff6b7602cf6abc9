"""Settings of the whole suite.

One torch thread per worker where tests run in parallel, lest two fight over a core. Without a GPU, kernels run in
Triton's interpreter, which must be chosen before triton is first imported; tests that compile do so in processes of
their own.
"""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest_plugins = ["demo_fixtures"]
