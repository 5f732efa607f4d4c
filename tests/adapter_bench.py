"""A bench of images, maps and a model in; out come the outcomes of a Quantus metric through the adapter, made cheap."""

import copy
from typing import Any

from tests.metrics_oracle import Bench, gradient_map, key_of
from xaibatch.metrics.quantus_adapter import QuantusMetric, score_with_quantus

SMALL: dict[str, dict[str, Any]] = {
    "FaithfulnessCorrelation": {"nr_runs": 8, "subset_size": 40},
    "FaithfulnessEstimate": {"features_in_step": 128},
    "Monotonicity": {"features_in_step": 128},
    "MonotonicityCorrelation": {"features_in_step": 128, "nr_samples": 2},
    "PixelFlipping": {"features_in_step": 128},
    "RegionPerturbation": {"regions_evaluation": 5},
    "SensitivityN": {"features_in_step": 128},
    "ROAD": {"percentages": [10, 50]},
    "Infidelity": {"perturb_patch_sizes": [8], "n_perturb_samples": 1},
    "AvgSensitivity": {"nr_samples": 2},
    "MaxSensitivity": {"nr_samples": 2},
    "LocalLipschitzEstimate": {"nr_samples": 2},
    "RelativeInputStability": {"nr_samples": 2, "return_nan_when_prediction_changes": False},
    "RelativeOutputStability": {"nr_samples": 2, "return_nan_when_prediction_changes": False},
    "RelativeRepresentationStability": {"nr_samples": 2, "return_nan_when_prediction_changes": False},
    "Continuity": {"nr_steps": 4},
    "TopKIntersection": {"k": 50},
    "SmoothMPRT": {"nr_samples": 2},
}
"""Arguments that make a metric cheap."""


def outcomes_of(metric: QuantusMetric, bench: Bench, **changes: Any) -> list[Any]:
    arguments: dict[str, Any] = {
        "x_BCHW": bench.x, "y_B": bench.y, "maps_BHW": bench.maps, "keys": [key_of(row) for row in range(len(bench.x))],
        "predict": bench.forward,
        "explain": lambda x, y, keys, model: gradient_map(model or bench.model, x, y),
        "load_model": lambda: copy.deepcopy(bench.model),
        "masks": {"lesion": bench.masks} if bench.masks is not None else None,
        "num_classes": 3,
    }  # fmt: skip
    return score_with_quantus(metric, **{**arguments, **changes})
