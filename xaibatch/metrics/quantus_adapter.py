"""Any Quantus metric by class name, run as it is: images, maps and two callables in, one value or status per image out.

Quantus and torch are imported when a metric is scored, not when it is named. Shape letters: B images, C channels, H W
pixels, K classes.
"""

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from xaibatch.errors import ConfigError, NotScoredError, UnknownNameError, UsageError
from xaibatch.maps import TokenGrid
from xaibatch.metrics.base import NOMINAL_GRID, Metric
from xaibatch.metrics.curves import trapezoid
from xaibatch.metrics.quantus_environment import (
    Explain,
    Predict,
    keyed_explanations,
    lent_numpy_names,
    own_draws,
    replica_module,
    smoothed_explanations,
)
from xaibatch.metrics.quantus_facts import FUNCTION_MODULES, QUANTUS_METRICS, QuantusFacts
from xaibatch.metrics.reading import readable
from xaibatch.options import Options
from xaibatch.seeding import DrawKey
from xaibatch.types import ALL_ZERO_MAP, CHANGED_PREDICTION, ERROR, MISSING_MASK, NAN_MAP, OK, ZERO_DENOMINATOR

if TYPE_CHECKING:
    from torch import nn

_LOG = logging.getLogger(__name__)

_NULL_OPTION = "return_nan_when_prediction_changes"
"""Quantus's option of sensitivities and stabilities."""


class QuantusOptions(Options):
    """Keyword arguments of the Quantus class, passed on as they are (functions by their name), and three of ours."""

    model_config = ConfigDict(frozen=True, extra="allow")

    mask: str = "lesion"
    """Which mask a localisation metric gets as `s_batch`."""
    scored_class: Literal["label", "predicted"] = "label"
    """Whose output Quantus reads. Metrics that explain changed images get the explained class instead: Quantus has one
    argument for both."""
    softmax: bool | None = None
    """Argument of the metric's call: probabilities instead of logits. None: the metric's own default."""


class QuantusMetric(Metric):
    """A Quantus metric with its keyword arguments; made by `quantus_metric`, scored by `score_with_quantus`."""

    facts: ClassVar[QuantusFacts]
    Options = QuantusOptions
    options: QuantusOptions

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.higher_is_better = self.facts.direction(self.options.model_dump())

    def check(self) -> None:
        """Build the Quantus object once: ConfigError for an unknown or refused argument."""
        with redirect_stdout(io.StringIO()):  # Quantus prints advice
            self.build()
        if self.facts.across_images:
            _LOG.warning(
                "%s compares the images of one shard with each other: its scores depend on engine.shard_size and on "
                "the order of the images, and are reported without intervals, tests and ranks",
                self.name,
            )

    def build(self, num_classes: int | None = None) -> Any:
        """A fresh Quantus object (they keep state between calls); ConfigError for arguments that Quantus refuses.

        num_classes goes to a metric that has such an argument, unless the options say otherwise (Quantus: 1000).
        """
        kind = _quantus_class(self.facts.name)
        known = {p for base in kind.__mro__ if "__init__" in vars(base) for p in inspect.signature(base).parameters}
        known -= {"kwargs", "args"}
        arguments = {key: _function(key, value) for key, value in (self.options.model_extra or {}).items()}
        for key in arguments:
            if key not in known:
                raise ConfigError(str(UnknownNameError(f"argument of {self.name}", key, known)))
        quiet: dict[str, Any] = {"disable_warnings": True, "display_progressbar": False, "return_aggregate": False}
        if num_classes is not None:
            quiet["num_classes"] = num_classes
        quiet = {key: value for key, value in quiet.items() if key in known}
        try:
            return kind(**{**quiet, **arguments})
        except (TypeError, ValueError, AssertionError) as error:
            given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            raise ConfigError(f"{self.name} refuses {given}: {type(error).__name__} {error}") from None

    def cost(self, shape_CHW: tuple[int, int, int] = (3, 224, 224), grid: TokenGrid = NOMINAL_GRID) -> str:
        return "as Quantus calls the model, per explainer"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.facts.name, self.options.model_dump())


def _restored(name: str, options: dict[str, Any]) -> QuantusMetric:
    return quantus_metric(name)(**options)


@cache
def quantus_metric(name: str) -> type[QuantusMetric]:
    """The adapter class for one Quantus class name; UnknownNameError lists Quantus's metrics.

    Names of Quantus 0.6 are known without importing it; any other name is looked up in the installed version.
    """
    facts = QUANTUS_METRICS.get(name) or QuantusFacts.of(_quantus_class(name))
    if facts.refused:
        raise UsageError(f"quantus:{name} cannot be used here: {facts.refused}")
    attributes = {
        "name": f"quantus:{name}",
        "title": f"{name} (Quantus)",
        "family": facts.family,
        "paper": "as Quantus cites it",
        "higher_is_better": facts.higher_is_better,
        "bounds": (float("-inf"), float("inf")),
        "needs": frozenset({"image", "mask"} if facts.needs_mask else {"image"}),
        "across_images": facts.across_images,
        "facts": facts,
        "__doc__": f"Quantus's {name} as it is.",
    }
    return type(f"Quantus{name}", (QuantusMetric,), attributes)


def _quantus_class(name: str) -> Any:
    import quantus
    from quantus.metrics.base import Metric as QuantusBase

    kind = getattr(quantus, name, None)
    if not (isinstance(kind, type) and issubclass(kind, QuantusBase)):
        raise UnknownNameError(
            "Quantus metric", name, [key for key, facts in QUANTUS_METRICS.items() if not facts.refused]
        )
    return kind


def _function(key: str, value: Any) -> Any:
    """A Quantus function named by a string (`similarity_func: correlation_spearman`); any other value unchanged."""
    if not isinstance(value, str) or not (key.endswith("_func") or key.startswith("norm_")):
        return value
    import importlib

    modules = [importlib.import_module(f"quantus.functions.{module}") for module in FUNCTION_MODULES]
    found = next((getattr(module, value) for module in modules if callable(getattr(module, value, None))), None)
    if found is None:
        known = {item for module in modules for item, obj in vars(module).items() if inspect.isfunction(obj)}
        raise ConfigError(str(UnknownNameError(f"Quantus function for {key}", value, known)))
    return found


class Outcome(NamedTuple):
    """What became of one image: a value, or None with a status and a reason."""

    value: float | None
    status: str = OK
    reason: str = ""


def score_with_quantus(
    metric: QuantusMetric,
    *,
    x_BCHW: NDArray[np.floating],
    y_B: NDArray[np.int64],
    maps_BHW: NDArray[np.floating],
    keys: Sequence[DrawKey],
    predict: Predict,
    explain: Explain | None = None,
    load_model: "Callable[[], nn.Module] | None" = None,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    num_classes: int | None = None,
) -> list[Outcome]:
    """Score every image with Quantus; one bad image never spoils another. Returns B outcomes in order.

    x_BCHW: normalised images (Quantus computes in float32). y_B: the class whose output and explanation count.
    maps_BHW: pixel maps after the run's normalisation, (B,H,W) or (B,1,H,W). keys: Quantus draws from NumPy's global
    stream, which is seeded from the image's key for the call and restored after it.
    predict, explain: see `Predict` and `Explain`; `explain` is needed by robustness and randomisation metrics.
    load_model: for the metrics that need weights or hidden layers (`facts.needs_model`).
    masks: name -> bool (B,H,W). num_classes: for Random Logit.

    Images are scored one by one, so that normalisation and draws do not depend on who else is there; metrics that
    compare images with each other (`facts.across_images`) get all readable images of the call at once. A metric that
    returns a curve or one value a layer is reduced by `reduced`.
    """
    maps = np.asarray(maps_BHW).reshape(len(x_BCHW), 1, *x_BCHW.shape[-2:])
    if metric.facts.needs_explanations and explain is None:
        raise UsageError(f"{metric.name} explains changed images or models: it needs `explain`")
    if metric.facts.needs_model and load_model is None:
        raise UsageError(f"{metric.name} needs the model's weights or hidden layers: it needs `load_model`")
    model = _gradients_allowed(load_model()) if metric.facts.needs_model and load_model else replica_module(predict)

    outcomes: list[Outcome | None] = [_refused(metric, row, maps, masks) for row in range(len(maps))]
    open_rows = [row for row, outcome in enumerate(outcomes) if outcome is None]
    calls = [open_rows] if metric.facts.across_images else [[row] for row in open_rows]

    def scored(metric: QuantusMetric, rows: list[int]) -> list[Outcome]:
        call = {
            "model": model,
            "x_batch": np.array(x_BCHW[rows]),
            "y_batch": np.asarray(y_B)[rows],
            "a_batch": np.array(maps[rows]),
            "s_batch": np.array(masks[metric.options.mask][rows][:, None])
            if masks and metric.facts.needs_mask
            else None,
            "explain_func": keyed_explanations(explain, [keys[row] for row in rows], metric.facts.changes_weights),
            "channel_first": True,
            "batch_size": len(rows),
        }
        if metric.options.softmax is not None:
            call["softmax"] = metric.options.softmax
        return _called(metric, call, keys[rows[0]], num_classes)

    for rows in filter(None, calls):
        done = scored(metric, rows)
        if done[0].status == CHANGED_PREDICTION:  # Quantus gives NaN for an undefined value too: told apart without it
            regardless = scored(_regardless_of_prediction(metric), rows)
            done = done if regardless[0].value is not None else regardless
        for row, outcome in zip(rows, done, strict=True):
            outcomes[row] = outcome
    return [outcome or Outcome(None, ERROR, "not scored") for outcome in outcomes]


def _refused(
    metric: QuantusMetric, row: int, maps: NDArray[np.floating], masks: Mapping[str, NDArray[np.bool_]] | None
) -> Outcome | None:
    try:
        readable(maps[row, 0])
    except NotScoredError as error:
        return Outcome(None, error.status, error.reason)
    if metric.facts.needs_mask:
        name = metric.options.mask
        if masks is None or name not in masks or not masks[name][row].any():
            return Outcome(None, MISSING_MASK, f"the image has no {name!r} mask")
    return None


def _called(metric: QuantusMetric, call: dict[str, Any], key: DrawKey, num_classes: int | None) -> list[Outcome]:
    num_images = len(call["x_batch"])
    with redirect_stdout(io.StringIO()):  # Quantus prints advice
        quantus_object = metric.build(num_classes)
    if metric.facts.smooths:
        quantus_object.explain_smooth_batch_numpy = smoothed_explanations(quantus_object, call["explain_func"])
    try:
        with own_draws(key), lent_numpy_names(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            result = quantus_object(**call)
    except Exception as error:  # Quantus raises whatever its NumPy does; every image gets its row
        status, reason = _status_of(error)
        return [Outcome(None, status, reason)] * num_images
    try:
        values = reduced(result, num_images)
    except (TypeError, ValueError) as error:
        return [Outcome(None, ERROR, f"{metric.name} returned {type(result).__name__}: {error}")] * num_images
    return [_outcome(value, quantus_object) for value in values]


def _outcome(value: float, quantus_object: Any) -> Outcome:
    if np.isfinite(value):
        return Outcome(value)
    if np.isnan(value) and _null_on_changed_prediction(quantus_object):
        return Outcome(None, CHANGED_PREDICTION, f"Quantus returned {value}: a copy has another predicted class")
    return Outcome(None, ZERO_DENOMINATOR, f"Quantus returned {value}")


def _regardless_of_prediction(metric: QuantusMetric) -> QuantusMetric:
    return type(metric)(**{**metric.options.model_dump(), _NULL_OPTION: False})


def _null_on_changed_prediction(quantus_object: Any) -> bool:
    name = _NULL_OPTION
    checks = (getattr(quantus_object, f"changed_prediction_indices{end}", None) for end in ("", "_func"))
    return bool(getattr(quantus_object, name, False)) or any(
        getattr(c, "keywords", {}).get(name, False) for c in checks
    )


def _status_of(error: Exception) -> tuple[str, str]:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, NotScoredError):
        return error.status, error.reason
    if isinstance(error, AssertionError) and "all equal to zero" in text:
        return ALL_ZERO_MAP, text
    return (NAN_MAP, text) if "contains NaN" in text else (ERROR, text)


def reduced(result: Any, num_images: int) -> list[float]:
    """One number per image from whatever a Quantus metric returned.

    - one number or truth value per image: as it is (True is 1);
    - a curve per image (pixel flipping, region perturbation, selectivity): mean height by the trapezoid rule, which is
      Quantus's `return_auc_per_sample` divided by the number of intervals;
    - a dictionary of layers (parameter randomisation): the mean over layers, without the layer `original`, which
      compares the map with itself; a dictionary of numbers (ROAD): their mean;
    - one number or one curve for the whole call (Sensitivity-N correlates across images): its mean, for every image.
    """
    if isinstance(result, Mapping):
        rows = [np.atleast_1d(np.asarray(value, np.float64)) for name, value in result.items() if name != "original"]
        return reduced(np.stack(rows).mean(0), num_images)
    values = np.asarray(result, np.float64)
    if values.ndim == 1 and len(values) == num_images:
        return [float(value) for value in values]
    if values.ndim == 2 and len(values) == num_images:
        return [trapezoid(curve) / (len(curve) - 1) if len(curve) > 1 else float(curve[0]) for curve in values]
    if values.ndim <= 1 and values.size:
        return [float(values.mean())] * num_images
    raise ValueError(f"shape {values.shape} is neither one number nor one curve per image")


def _gradients_allowed(model: "nn.Module") -> "nn.Module":
    from xaibatch.metrics.quantus_gradients import gradients_allowed

    return gradients_allowed(model)
