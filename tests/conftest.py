"""Tests run on one thread and without a network."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts its threads
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

torch.set_num_threads(1)
