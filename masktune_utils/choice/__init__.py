"""What depends on a place? `audit`; `hide` it. Which mask? `choose`, without groups."""

from masktune_utils.choice.audit import Audit, audit
from masktune_utils.choice.chosen import Choice, choose, hide, load_or_choose
from masktune_utils.choice.held_out import ERM, NULL, HeldOut
