"""The plan kinds of ROAD and of Nguyen's Monotonicity made into copies, and normal noise: registered with `prepare`.

Shape letters: S samples (copies), s the copies of one range, C channels, H W pixels, N pixels in order, K removed
pixels, G groups of entries.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xaibatch.perturb.expand import Expander, prepare
from xaibatch.perturb.plans import FillPlan, GaussianNoisePlan, ImputationPlan

NEIGHBOURS: Final = tuple(
    ((rows, columns), 1 / 6 if 0 in (rows, columns) else 1 / 12)
    for rows in (-1, 0, 1)
    for columns in (-1, 0, 1)
    if (rows, columns) != (0, 0)
)
"""(row, column) offset and weight of a pixel's eight neighbours (Rong et al. 2022); the weights sum to
1."""


@prepare.register
def _(plan: GaussianNoisePlan, image_CHW: Tensor) -> Expander:
    exact_CHW = _exact(image_CHW)
    shape = (len(exact_CHW), *exact_CHW.shape[1:])
    return _one_by_one(image_CHW, lambda sample: exact_CHW + plan.noise_CHW(sample, (shape[0], shape[1], shape[2])))


@prepare.register
def _(plan: ImputationPlan, image_CHW: Tensor) -> Expander:
    exact_CHW = _exact(image_CHW)

    def copy(sample: int) -> NDArray[np.float64]:
        removed_K = plan.order_N[: plan.counts_S[sample]]
        changed_CN = exact_CHW.reshape(len(exact_CHW), -1).copy()
        if len(removed_K):
            changed_CN[:, removed_K] = imputed(exact_CHW, removed_K) + plan.noise_CK(sample, len(exact_CHW))
        return changed_CN.reshape(exact_CHW.shape)

    return _one_by_one(image_CHW, copy)


@prepare.register
def _(plan: FillPlan, image_CHW: Tensor) -> Expander:
    rows = 1 if plan.entries == "channel" else len(image_CHW)
    image_rE = image_CHW.reshape(rows, -1)
    index_GK = torch.as_tensor(plan.index_GK, dtype=torch.int64, device=image_CHW.device)
    values_S = torch.as_tensor(plan.value_S, device=image_CHW.device).to(image_CHW.dtype)

    def copies(start: int, stop: int) -> Tensor:
        index_sK = index_GK[torch.as_tensor(plan.group_S[start:stop], dtype=torch.int64, device=image_CHW.device)]
        index_srK = index_sK[:, None].expand(-1, rows, -1)
        copies_srE = image_rE.expand(stop - start, -1, -1).clone()
        copies_srE.scatter_(2, index_srK, values_S[start:stop, None, None].expand_as(index_srK))
        return copies_srE.view(-1, *image_CHW.shape)

    return copies


def imputed(image_CHW: NDArray[np.float64], removed_K: NDArray[np.integer]) -> NDArray[np.float64]:
    """Values (C,K) of the removed pixels such that each is the weighted mean of its neighbours (see ImputationPlan).

    One sparse linear system for all removed pixels, its right-hand side from the pixels that stay, one per channel. The
    matrix is symmetric and diagonally dominant, so no pivoting is needed. Singular only if every pixel is removed.
    """
    from scipy.sparse import csc_array, diags_array
    from scipy.sparse.linalg import splu

    height, width = image_CHW.shape[1:]
    pixels_CN = image_CHW.reshape(len(image_CHW), -1)
    unknown_N = np.full(height * width, -1)
    unknown_N[removed_K] = np.arange(len(removed_K))
    row_K, column_K = np.divmod(np.asarray(removed_K, np.int64), width)
    weight_K = np.zeros(len(removed_K))
    known_CK = np.zeros((len(image_CHW), len(removed_K)))
    equations, unknowns, weights = [], [], []
    for (down, right), weight in NEIGHBOURS:
        inside = (row_K + down >= 0) & (row_K + down < height) & (column_K + right >= 0) & (column_K + right < width)
        equation = np.flatnonzero(inside)
        neighbour = (row_K + down)[equation] * width + (column_K + right)[equation]
        weight_K[equation] += weight
        stays = unknown_N[neighbour] < 0
        known_CK[:, equation[stays]] += weight * pixels_CN[:, neighbour[stays]]
        equations.append(equation[~stays])
        unknowns.append(unknown_N[neighbour[~stays]])
        weights.append(np.full((~stays).sum(), weight))
    entries = (np.concatenate(weights), (np.concatenate(equations), np.concatenate(unknowns)))
    system = diags_array(weight_K) - csc_array(entries, shape=(len(removed_K), len(removed_K)))
    symmetric = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
    factors = splu(csc_array(system), **symmetric)
    solution_CK: NDArray[np.float64] = factors.solve(known_CK.T).T
    return solution_CK


def _exact(image_CHW: Tensor) -> NDArray[np.float64]:
    return image_CHW.detach().cpu().double().numpy()


def _one_by_one(image_CHW: Tensor, copy: Callable[[int], NDArray[np.float64]]) -> Expander:
    """Copies made in float64 on the CPU, then cast and moved."""

    def copies(start: int, stop: int) -> Tensor:
        made_sCHW = torch.empty((stop - start, *image_CHW.shape), dtype=image_CHW.dtype)
        for row, sample in enumerate(range(start, stop)):
            made_sCHW[row] = torch.from_numpy(copy(sample))
        return made_sCHW.to(image_CHW.device)

    return copies
