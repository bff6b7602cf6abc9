"""Settings of the whole suite: one torch thread per worker where tests run in parallel, lest two fight over a core."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
