"""An image's several findings in, the one label it is filed under out, or none: for sets that label more than one
thing."""

from collections import Counter
from collections.abc import Collection
from typing import Literal

from xaibatch.options import Options


class FindingOptions(Options):
    """How a set with several findings an image (NIH ChestX-ray14, CheXpert) becomes one with one class an image."""

    classes: tuple[str, ...] | None = None
    """Findings that become classes, in order of priority; others are left unread. None: every finding of the set."""

    several: Literal["exclude", "first"] = "exclude"
    """An image with more than one of these findings: left out, or filed under the first of `classes`
    (of the set's own order where none are given)."""

    uncertain: Literal["exclude", "negative", "positive"] = "exclude"
    """A finding marked as uncertain (-1 of CheXpert): the image is left out, or it counts as absent or present."""

    frontal_only: bool = True
    """Leave out lateral views, where the set names the view."""


class LabelChoice:
    """Chooses one label an image and counts why images were left out."""

    def __init__(self, options: FindingOptions, findings: Collection[str]) -> None:
        self.options = options
        self.wanted = options.classes or tuple(findings)
        self.left_out: Counter[str] = Counter()

    def label(self, present: Collection[str], uncertain: Collection[str] = ()) -> str | None:
        """The class of an image with these findings present and uncertain; None: it is left out.

        >>> choice = LabelChoice(FindingOptions(classes=("Effusion", "Edema"), several="first"), ())
        >>> choice.label(["Edema", "Effusion", "Mass"]), choice.label(["Mass"]), dict(choice.left_out)
        ('Effusion', None, {'no such finding': 1})
        """
        found = set(present)
        unsure = [name for name in self.wanted if name in uncertain]
        if self.options.uncertain == "positive":
            found |= set(unsure)
        chosen = [name for name in self.wanted if name in found]
        reason = ""
        if unsure and self.options.uncertain == "exclude":
            reason = "an uncertain finding"
        elif not chosen:
            reason = "no such finding"
        elif len(chosen) > 1 and self.options.several == "exclude":
            reason = "several findings"
        if reason:
            self.left_out[reason] += 1
            return None
        return chosen[0]

    def notes(self) -> tuple[str, ...]:
        """What was left out and why, one sentence a reason."""
        return tuple(f"{count} images were left out: {reason}" for reason, count in sorted(self.left_out.items()))
