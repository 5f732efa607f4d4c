"""What is known of every Quantus 0.6 metric without importing Quantus: family, direction, and what its call needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

Family = Literal["faithfulness", "robustness", "complexity", "localisation", "randomisation", "causal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantusFacts:
    """One Quantus class.

    higher_is_better:   under Quantus's default options, None if neither is; see `direction`.
    needs_explanations: explains changed images, classes or models during the call.
    needs_model:        reads weights or hidden layers, so that a replica's outputs are not enough.
    changes_weights:    explains models with changed weights.
    across_images:      compares the images of one call with each other: its value depends on the shard.
    smooths:            averages explanations over noisy inputs itself (Smooth MPRT).
    refused:            why it cannot be used, empty if it can.
    """

    name: str
    family: Family
    higher_is_better: bool | None
    needs_explanations: bool = False
    needs_model: bool = False
    changes_weights: bool = False
    needs_mask: bool = False
    across_images: bool = False
    smooths: bool = False
    refused: str = ""

    def direction(self, options: Mapping[str, Any]) -> bool | None:
        """Whether higher is better under these options of the metric; None where neither is or it hangs on the image.

        It differs from what Quantus declares for the class where its formula says otherwise: Region Perturbation
        measures the drop, Consistency the share of equally explained images that are predicted alike.
        """
        if self.name == "RegionPerturbation":
            return {"morf": True, "lerf": False}.get(options.get("order", "morf"))
        if self.name == "RelevanceMassAccuracy":  # of signed sums: see the native metric
            return True if options.get("abs") else None
        signed = not options.get("abs", True) and not options.get("positive_attributions")
        if self.name in ("Sparseness", "AttributionLocalisation") and signed:
            return None
        if self.name == "IROF" and options.get("softmax") is False:  # relative to a logit, which may be negative
            return None
        compared = options.get("similarity_func")
        if compared is not None and self.name in _COMPARED:
            is_likeness = getattr(compared, "__name__", compared) in _LIKENESSES
            return self.higher_is_better if is_likeness == _COMPARED[self.name] else None
        measured = options.get("complexity_func")
        if measured is not None and self.name == "EfficientMPRT":
            return True if getattr(measured, "__name__", measured) in ("entropy", "discrete_entropy") else None
        return self.higher_is_better

    @classmethod
    def of(cls, kind: Any) -> "QuantusFacts":
        """Facts of a class that Quantus 0.6 did not have, from the class itself; its explainer may see changed
        models."""
        families: dict[str, Family] = {
            "Faithfulness": "faithfulness",
            "Robustness": "robustness",
            "Complexity": "complexity",
            "Localisation": "localisation",
            "Randomisation": "randomisation",
            "Axiomatic": "faithfulness",
        }
        family = families.get(str(kind.evaluation_category.value), "faithfulness")
        return cls(
            name=kind.__name__,
            family=family,
            higher_is_better=kind.score_direction.value == "higher",
            needs_explanations=family in ("robustness", "randomisation"),
            needs_model=family == "randomisation",
            changes_weights=family == "randomisation",
            needs_mask=family == "localisation",
        )


_LIKENESSES: Final = frozenset({"correlation_pearson", "correlation_spearman", "correlation_kendall_tau", "ssim"})
"""Quantus's `similarity_func`s that are larger the more alike their arguments; all others are distances."""

_COMPARED: Final = MappingProxyType(
    dict.fromkeys(
        (
            "FaithfulnessCorrelation",
            "FaithfulnessEstimate",
            "MonotonicityCorrelation",
            "SensitivityN",
            "RandomLogit",
            "MPRT",
            "SmoothMPRT",
        ),
        True,
    )
    | dict.fromkeys(("AvgSensitivity", "MaxSensitivity", "LocalLipschitzEstimate"), False)
)
"""Metrics with a `similarity_func`, and whether their direction is that of a likeness (True) or of a distance."""


def _plain(names: str, family: Family, higher_is_better: bool | None, **facts: bool) -> list[QuantusFacts]:
    return [
        QuantusFacts(name=name, family=family, higher_is_better=higher_is_better, **facts)  # type: ignore[arg-type]
        for name in names.split()
    ]


_ALL: Final = (
    *_plain("FaithfulnessCorrelation FaithfulnessEstimate IROF", "faithfulness", True),
    *_plain("Monotonicity MonotonicityCorrelation", "faithfulness", True),
    *_plain("PixelFlipping Selectivity ROAD Infidelity", "faithfulness", False),
    *_plain("RegionPerturbation", "faithfulness", True),
    *_plain("SensitivityN Sufficiency", "faithfulness", True, across_images=True),
    *_plain("Completeness", "faithfulness", True),
    *_plain("NonSensitivity", "faithfulness", False),
    *_plain("InputInvariance", "robustness", True, needs_explanations=True, needs_model=True, changes_weights=True),
    *_plain(
        "AvgSensitivity MaxSensitivity LocalLipschitzEstimate Continuity", "robustness", False, needs_explanations=True
    ),
    *_plain("RelativeInputStability RelativeOutputStability", "robustness", False, needs_explanations=True),
    *_plain("RelativeRepresentationStability", "robustness", False, needs_explanations=True, needs_model=True),
    *_plain("Consistency", "robustness", True, across_images=True),
    *_plain("Sparseness", "complexity", True),
    *_plain("Complexity EffectiveComplexity", "complexity", False),
    *_plain(
        "PointingGame TopKIntersection RelevanceRankAccuracy AttributionLocalisation AUC",
        "localisation",
        True,
        needs_mask=True,
    ),
    *_plain("RelevanceMassAccuracy", "localisation", None, needs_mask=True),
    *_plain("RandomLogit", "randomisation", False, needs_explanations=True),
    *_plain("MPRT", "randomisation", False, needs_explanations=True, needs_model=True, changes_weights=True),
    *_plain("EfficientMPRT", "randomisation", True, needs_explanations=True, needs_model=True, changes_weights=True),
    *_plain(
        "SmoothMPRT",
        "randomisation",
        False,
        needs_explanations=True,
        needs_model=True,
        changes_weights=True,
        smooths=True,
    ),
    QuantusFacts(
        name="BatchSufficiency",
        family="faithfulness",
        higher_is_better=True,
        across_images=True,
        refused="Quantus 0.6 reshapes its batch to a single image and fails; Sufficiency computes the same",
    ),
    QuantusFacts(
        name="Focus",
        family="localisation",
        higher_is_better=True,
        refused="it scores mosaics of four images, and a data set here is read image by image",
    ),
)

QUANTUS_METRICS: Final = MappingProxyType({facts.name: facts for facts in _ALL})
"""Facts by class name."""

FUNCTION_MODULES: Final = (
    "similarity_func",
    "perturb_func",
    "normalise_func",
    "norm_func",
    "loss_func",
    "discretise_func",
    "complexity_func",
)
"""Modules of `quantus.functions` whose functions may be named by a string in the metric's options."""
