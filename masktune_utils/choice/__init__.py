"""Which mask? `choose` answers without group labels."""

from masktune_utils.choice.held_out import ERM, NULL, HeldOut
from masktune_utils.choice.score import Choice, choose

__all__ = [
    "ERM",
    "NULL",
    "Choice",
    "HeldOut",
    "choose",
]
