"""Rules compared on saved predictions of development seeds, without any training.

    python studies/rules.py        # → results/rules.csv, in a minute

`results/exchanges.zip` holds, for seeds 206 and 207, ten exchanges of each mistake, both
ways: the part of the image comes from another one of its class (does the mistake
leave?), and goes into that one (does it come?). `explained.py` makes it. The models are
those of both folds.
"""

from collections.abc import Callable

import io
import zipfile

import numpy as np
import pandas as pd

from masktune_utils.choice.held_out import ERM, FEW, NULL
from masktune_utils.choice.score import BETTER, CLEAR, ENOUGH, SURE
from masktune_utils.settings import REPOSITORY
