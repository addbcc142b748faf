"""Where there is no GPU, Triton's interpreter stands in for it: Triton reads this as it is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
