"""What all tests share.

Tests run in two processes at a time (see pyproject.toml), each on one thread: threads that wait for others on a busy
machine take ten times as long. Where there is no GPU, Triton's interpreter stands in for it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in what tests start

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is
