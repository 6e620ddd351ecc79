"""Where do mistakes come from? `audit`. Which mask? `choose`, without group labels."""

from masktune_utils.choice.audit import Audit, audit
from masktune_utils.choice.chosen import Choice, choose, load_or_choose
from masktune_utils.choice.held_out import ERM, NULL, HeldOut
