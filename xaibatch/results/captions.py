"""Marks and titles in, the captions of charts and the notes of tables out: the same words in the report, in exported
pictures and in LaTeX."""

from collections.abc import Collection, Iterable
from typing import Final

from xaibatch.results.statistics import Summary

RANKS: Final = (
    "Rank of each explainer’s mean under each metric (1 is best), in brackets the 95% interval of the rank under "
    "resampled patients. Ranks are not averaged over metrics."
)

CRITICAL_DIFFERENCES: Final = (
    "Mean rank within patients. A thick bar joins explainers that Nemenyi’s critical difference does not tell apart at "
    "5%. Nemenyi’s test compares ranks alone and all explainers at once: it is weaker than the paired tests of single "
    "pairs, whose verdicts “better” and “worse” stand also where a bar joins the two."
)

DISTRIBUTIONS: Final = (
    "Scores of single images: box from first to third quartile, white line the median, whiskers from the 5th to the "
    "95th percentile. Scores of at most four values are bars of their mean. Fewer than ten images are drawn one by one."
)

MARKS: Final = {
    "†": "not distinguishable from the random map",
    "‡": "worse than the random map",
    "?": "too few images to tell from the random map",
}
"""What a mark beside a score says."""


def intervals(summaries: Collection[Summary], marks: Iterable[str], *, floor: bool) -> str:
    """Caption of the means with their intervals; `marks` as they stand beside the scores."""
    text = "Mean and 95% interval, all images."
    if floor:
        text += " Grey band and open circle: the random map."
    if any(s.alike and s.interval for s in summaries):
        text += " Dotted: nearly all scores are equal, the interval comes from the metric’s range."
    noted = ", ".join(mark_notes(marks))
    return f"{text} {noted}." if noted else text


def mark_notes(marks: Iterable[str]) -> list[str]:
    """One note for each kind of mark that is there.

    >>> mark_notes(["‡", "", "‡"])
    ['‡ worse than the random map']
    """
    there = set(marks)
    return [f"{mark} {words}" for mark, words in MARKS.items() if mark in there]
