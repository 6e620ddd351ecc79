"""The score: of ERM's mistakes, how many more does a mask correct than nothing masked?

Mistakes on held-out images are counted kind by kind (class, prediction). Kinds that
move with what the mask hides (`exchange.explained`) count more.

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024); cells of class and
prediction to choose by: uLA (Tsirigotis et al., 2023). Using them to choose masks is
ours. Notebook 6 and tests/test_score.py write the score down again, on purpose.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import pandas as pd

from masktune_utils.choice.exchange import FEW
from masktune_utils.choice.held_out import ERM, NULL, HeldOut

LEVEL = 0.05  # of a one-sided test
ENOUGH = 0.1  # what a mask must gain
PRICE = 0.15  # of accuracy on held-out images, that a mask may cost and be taken
BETTER = 0.5  # standard errors by which a later mask must gain more than an earlier one
# A mask that gains this much of what nothing masked leaves ends the search; from the
# fifth mask on, CLEAR_LATER is enough.
CLEAR = 0.8
CLEAR_LATER = 0.6
FIRST_MASKS = 4


@dataclass(frozen=True)
class Verdict:
    """What held-out images say.

    Attributes:
        chosen: a mask; or `ERM`, which is then kept.
        best: the chosen mask; if ERM is kept, the one that gains most.
        reason: in words.
        is_final: whether no further mask need be tried.
    """

    chosen: str
    best: str
    reason: str
    is_final: bool = False


def scores(held_out: HeldOut) -> pd.DataFrame:
    """Of ERM's mistakes, how many more does each mask correct than nothing masked?

    Returns:
        A row for each mask that was tried. Of the mistakes, each kind weighted by the
        share of it that moves with what the mask hides: the share that is right with
        `nothing` masked and with the `mask`; the `score`, which is the difference, in
        [-1, 1], and its standard `error`, as if there were one mistake more, a full
        step away; the `gain`, the score less what the mask loses on the images that are
        no mistakes of ERM (the mean over classes). In numbers, without weights: how
        many mistakes `move` with what the mask hides, in half of the swaps or more; how
        many nothing masked and the mask correct, `nothing_corrects` and
        `mask_corrects`. The `price`: by how much the mask lowers the accuracy of
        nothing masked, on all images. And whether the mask `destroys` a class: its
        accuracy falls below chance. If no mistake moves, the score is 0, and has no
        error.
    """
    labels = pd.Series(held_out.labels)
    predictions = pd.DataFrame(held_out.predictions)
    right = predictions.eq(labels, axis=0).astype(float)
    is_mistake = right[ERM] == 0
    with_mask = right[held_out.tried]
    shares = pd.DataFrame(held_out.explained)[held_out.tried]

    by_kind = shares[is_mistake].groupby([labels, predictions[ERM]])
    weights = by_kind.transform("mean").div(by_kind.transform("size"), axis=0)
    weights = weights / weights.sum()
    nothing = right.loc[is_mistake, NULL]
    better = with_mask.sub(right[NULL], axis=0)
    gains = better[is_mistake]
    score = (weights * gains).sum()
    variance = (weights * (gains - score) ** 2).sum()
    count = 1 / (weights**2).sum()  # of equal weights that would be as exact
    error = ((count * variance + 1) / (count + 1) / count) ** 0.5

    of_rest = better[~is_mistake].groupby(labels).mean().mean().fillna(0)
    of_classes = right.groupby(labels).mean()
    chance = 1 / len(of_classes)
    floor = of_classes[NULL].clip(upper=chance)
    columns = {
        "nothing": weights.mul(nothing, axis=0).sum(),
        "mask": (weights * with_mask[is_mistake]).sum(),
        "score": score,
        "error": error,
        "gain": score + of_rest.clip(upper=0),
        "moves": (shares >= 0.5).sum(),
        "nothing_corrects": nothing.sum(),
        "mask_corrects": with_mask[is_mistake].sum(),
        "price": -better.mean(),
        "destroys": of_classes[held_out.tried].lt(floor, axis=0).any(),
    }
    return pd.DataFrame(columns)


def sure(held_out: HeldOut) -> float:
    """Standard errors that a score must exceed.

    Short trainings: one-sided at `LEVEL`, as a clear mask ends the search. Whole
    trainings, of which the best mask is taken: corrected for the number of masks that
    were tried (Bonferroni).
    """
    count = len(held_out.tried) if held_out.share == 1 else 1
    return NormalDist().inv_cdf(1 - LEVEL / max(1, count))


def decide(held_out: HeldOut) -> Verdict:
    """Take a mask of those that were tried, or keep ERM.

    A mask is good if its score exceeds `sure` standard errors, it gains `ENOUGH`, it
    brings no class below chance, and its price is at most `PRICE`. The first good one
    within `BETTER` standard errors of the best is taken. The search ends when the best
    is clear.
    """
    if not held_out.tried:
        return Verdict(ERM, NULL, "ERM is kept: no mask hides anything.")
    if held_out.is_mistake.sum() < FEW:
        return _prior(held_out)
    table = scores(held_out)
    gain = table["gain"]
    is_right = table["score"] >= sure(held_out) * table["error"]
    is_right &= gain >= ENOUGH
    is_harmless = _is_harmless(table)
    good = gain[is_right & is_harmless]
    if good.empty:
        best = (gain[is_right] if is_right.any() else gain).idxmax()
        why = "no mask clearly corrects its mistakes"
        if is_right.any():
            why = _harm(table.loc[best])
        counts = _counts(held_out, best, table.loc[best])
        return Verdict(ERM, best, f"ERM is kept: {why}.\nThe best: {counts}")
    best = good.idxmax()
    nearly = good[best] - BETTER * table.loc[best, "error"]
    chosen = good[good >= nearly].index[0]
    clear = CLEAR if len(table) <= FIRST_MASKS else CLEAR_LATER
    is_clear = good >= clear * (1 - table["nothing"][good.index])
    counts = _counts(held_out, chosen, table.loc[chosen])
    return Verdict(chosen, chosen, f"Chosen: {counts}", is_final=is_clear.any())


def _is_harmless(table: pd.DataFrame) -> pd.Series:
    """Whether each mask brings no class below chance, and is not too expensive."""
    return ~table["destroys"].astype(bool) & (table["price"] <= PRICE)


def _harm(row: pd.Series) -> str:
    """Why a mask that is right for the mistakes is not taken."""
    if row["destroys"]:
        return "the best mask brings a class below chance"
    return (
        f"the best mask would cost {100 * row['price']:.1f} points of accuracy (allowed: "
        f"{100 * PRICE:.0f}): look at it, and take it by hand if it hides nothing else"
    )


def _counts(held_out: HeldOut, mask: str, row: pd.Series) -> str:
    """What decides, in words: a line a sentence."""
    mistakes = held_out.is_mistake.sum().item()
    plain = (row["mask_corrects"] - row["nothing_corrects"]) / mistakes
    words = (
        f'"{mask}".\nOf {mistakes} mistakes the mask corrects '
        f"{row['mask_corrects']:.0f}, nothing masked {row['nothing_corrects']:.0f}; "
        f"{row['moves']:.0f} move with what it hides.\n"
    )
    if math.isnan(row["error"]):
        return f"{words}No swap moves a mistake: it has no score."
    if abs(row["score"] - plain) >= 0.005:
        words += (
            f"Weighted by how far each kind moves: mask {row['mask']:.0%}, nothing "
            f"masked {row['nothing']:.0%}.\n"
        )
    score, error, gain = 100 * row[["score", "error", "gain"]]
    errors = sure(held_out)
    return words + (
        f"Its score: {score:.1f} points (needed: {errors * error:.1f}, which is "
        f"{errors:.2f} standard errors).\n"
        f"On other images it loses {score - gain:.1f}, which leaves a gain of {gain:.1f} "
        f"(needed: {100 * ENOUGH:.0f})."
    )


def _prior(held_out: HeldOut) -> Verdict:
    """Without mistakes: the first mask that gains enough where any mask hides."""
    table = scores(held_out)
    accuracy = pd.DataFrame(held_out.resampled).mean(axis=1)
    loss = table["score"] - table["gain"]
    gain = accuracy.drop([ERM, NULL]) - accuracy[NULL] - loss
    is_good = (gain >= ENOUGH) & _is_harmless(table)
    best = (is_good if is_good.any() else gain).idxmax()
    decision = f'Chosen: "{best}"' if is_good.any() else "ERM is kept"
    reason = (
        f"{decision}, by a prior: too few held-out mistakes "
        f"({held_out.is_mistake.sum()}) to tell which evidence misleads.\n"
        f'Gain of "{best}" over nothing masked,\nwhere masks hide a part, less what it '
        f"loses on other images: {100 * gain[best]:.1f} points (needed: "
        f"{100 * ENOUGH:.0f})."
    )
    return Verdict(best if is_good.any() else ERM, best, reason, is_final=True)
