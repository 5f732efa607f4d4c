"""How many samples LIME needs with independent and with antithetic ones, against a reference of 5,000 (of ten times
`num_samples`, where that is less); no times.

Shape letters: S samples, M superpixels, K classes, I images, N sample sizes.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from xaibatch.benchmark.explainer_bench import COPIES_BATCH, ExplainerBench
from xaibatch.benchmark.lines import Cell, Line, Part
from xaibatch.benchmark.setting import Setting
from xaibatch.benchmark.timing import Spread
from xaibatch.explainers.explained_output import probabilities
from xaibatch.explainers.lime_convergence import (
    REFERENCE_SAMPLES,
    LimeConvergence,
    Probabilities,
    equal_error_sizes,
    measure_convergence,
)
from xaibatch.perturb.plans import SuperpixelPlan
from xaibatch.perturb.runner import PlanRunner

SIZES = (50, 100, 200, 300, 500, 700, 1000)


def measure_sampling(setting: Setting) -> Part:
    """One line a sample size: errors of both kinds over images, and how many antithetic samples do as well."""
    options = setting.options
    bench = ExplainerBench(setting, min(options.heavy_images, options.images))
    sizes = [size for size in SIZES if size <= 2 * options.num_samples]
    num_reference = min(REFERENCE_SAMPLES, 10 * options.num_samples)
    measured = [
        measure_convergence(
            _model_answers(bench, row),
            key=bench.keys[row],
            num_segments=int(bench.segments[row].max()) + 1,
            target=bench.targets[row],
            sizes=sizes,
            num_repeats=options.runs,
            num_reference=num_reference,
        )
        for row in range(bench.num_images)
    ]
    return Part(
        name="sampling",
        title=f"LIME's samples, {options.model}, images: {bench.num_images}",
        lines=_lines(measured),
        notes=(
            f"relative error of the weights: distance to those of {num_reference} independent samples of their own "
            "draws, over their length; mean over repeats, median (smallest-largest) of the images",
            "equally good: antithetic samples whose mean error is that of so many independent ones",
            "agreement: mean correlation between repeats",
            f"{options.runs} repeats, superpixels an image: "
            + ", ".join(str(int(segments_HW.max()) + 1) for segments_HW in bench.segments),
        ),
    )


def _lines(measured: list[LimeConvergence]) -> list[Line]:
    independent_IN = np.array([one.independent_RN.mean(0) for one in measured])
    antithetic_IN = np.array([one.antithetic_RN.mean(0) for one in measured])
    sizes_N = measured[0].sizes_N
    equal_N = equal_error_sizes(sizes_N, independent_IN.mean(0), antithetic_IN.mean(0))
    lines = []
    for n, size in enumerate(sizes_N):
        cells: dict[str, Cell] = {
            "error, independent": Spread.of(independent_IN[:, n].tolist()),
            "error, antithetic": Spread.of(antithetic_IN[:, n].tolist()),
            "equally good": None if np.isnan(equal_N[n]) else float(equal_N[n]),
            "agreement, independent": float(np.mean([one.agreement_N[n] for one in measured])),
            "agreement, antithetic": float(np.mean([one.antithetic_agreement_N[n] for one in measured])),
        }
        lines.append(Line(name=f"{size} samples", cells=cells))
    return lines


def _model_answers(bench: ExplainerBench, row: int) -> Probabilities:
    """What LIME asks the model about one image: superpixels shown, the others in their mean colour."""
    image_1CHW = bench.images_BCHW[row : row + 1]
    runner = PlanRunner(model=bench.setting.model, batch_size=COPIES_BATCH[bench.setting.device])

    def answers(keep_SM: NDArray[np.bool_]) -> NDArray[np.floating]:
        plan = SuperpixelPlan(segments_HW=bench.segments[row], keep_SM=keep_SM, baseline="segment_mean")
        with torch.inference_mode():
            (logits_SK,) = runner.run(image_1CHW, [(0, plan)])
        return probabilities(logits_SK)

    return answers
