"""What is known of every Quantus 0.6 metric without importing Quantus: family, direction, and what its call needs."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

Family = Literal["faithfulness", "robustness", "complexity", "localisation", "randomisation", "causal"]


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantusFacts:
    """One Quantus class.

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


def _plain(names: str, family: Family, higher_is_better: bool, **facts: bool) -> list[QuantusFacts]:
    return [
        QuantusFacts(name=name, family=family, higher_is_better=higher_is_better, **facts)  # type: ignore[arg-type]
        for name in names.split()
    ]


_ALL: Final = (
    *_plain("FaithfulnessCorrelation FaithfulnessEstimate IROF", "faithfulness", True),
    *_plain("Monotonicity MonotonicityCorrelation", "faithfulness", True),
    *_plain("PixelFlipping RegionPerturbation Selectivity ROAD Infidelity", "faithfulness", False),
    *_plain("SensitivityN Sufficiency", "faithfulness", True, across_images=True),
    *_plain("Completeness", "faithfulness", True),
    *_plain("NonSensitivity", "faithfulness", False),
    *_plain("InputInvariance", "robustness", True, needs_explanations=True, needs_model=True, changes_weights=True),
    *_plain(
        "AvgSensitivity MaxSensitivity LocalLipschitzEstimate Continuity", "robustness", False, needs_explanations=True
    ),
    *_plain("RelativeInputStability RelativeOutputStability", "robustness", False, needs_explanations=True),
    *_plain("RelativeRepresentationStability", "robustness", False, needs_explanations=True, needs_model=True),
    *_plain("Consistency", "robustness", False, across_images=True),
    *_plain("Sparseness", "complexity", True),
    *_plain("Complexity EffectiveComplexity", "complexity", False),
    *_plain(
        "PointingGame TopKIntersection RelevanceMassAccuracy RelevanceRankAccuracy AttributionLocalisation AUC",
        "localisation",
        True,
        needs_mask=True,
    ),
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
