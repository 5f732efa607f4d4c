"""Superpixels of changed images, made beside the replica, against those that the plain loop makes: same images, same
superpixels, same scores."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toy import Watch, toy_config, toy_images
from xaibatch.cluster.tasks import segment_variants
from xaibatch.data.sampling import shards
from xaibatch.perturb.segmentation import segment
from xaibatch.pipeline.job import Job, ShardExplanations
from xaibatch.pipeline.local import run_local
from xaibatch.pipeline.record import job_of
from xaibatch.pipeline.run import choose_images, evaluate
from xaibatch.pipeline.scoring import plan_group, score_group
from xaibatch.pipeline.session import Session
from xaibatch.types import Shard

EXPLAINERS = {
    "lime": {"num_samples": 12, "segmentation": "slic", "segmentation_options": {"n_segments": 16}},
    "kernel_shap": {
        "num_samples": 60,
        "segmentation": "quickshift",
        "segmentation_options": {"kernel_size": 1, "max_dist": 4},
    },
}
METRICS = {
    "smooth_mprt": {"num_samples": 3, "noise_magnitude": 0.2},
    "avg_sensitivity": {"num_samples": 2},
    "local_lipschitz_estimate": {"num_samples": 2},
    "random_logit": {},
    "efficient_mprt": {},
}


class Explained:
    """A shard of a run that has only been explained."""

    def __init__(self, folder: Path, precision: str) -> None:
        torch.set_num_threads(1)
        config = toy_config(
            toy_images(folder / "toy", num_per_class=1), folder / "run", explainers=EXPLAINERS,
            metrics={"sparseness": {}}, precision__default=precision, engine__shard_size=3,
        )  # fmt: skip
        outcome = evaluate(config, run_local, Watch())
        assert outcome.ok
        self.job: Job = job_of(outcome.record, config.model_copy(update={"metrics": METRICS}), outcome.folder)
        self.shard: Shard = next(iter(shards(choose_images(config).records, 3)))
        self.session = Session(self.job)
        self.explained: ShardExplanations = self.session.explain(self.shard)
        self.batch = self.session.hold(self.shard).batch


@pytest.fixture(scope="module", params=["float32", "float64"])
def explained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Explained:
    return Explained(tmp_path_factory.mktemp("superpixels"), request.param)


@pytest.mark.parametrize("metric", METRICS)
def test_superpixels_made_beside_the_replica_give_the_scores_of_those_made_there(
    explained: Explained, metric: str
) -> None:
    """Also the superpixels are those of the very image that the explainers are given, noisy copies on new weights
    included."""
    job, shard, batch, session = explained.job, explained.shard, explained.batch, explained.session
    (group,) = (group for group in job.groups if metric in group.metrics)
    plan = plan_group(job, group, explained.explained, batch)
    specs = tuple(str(explainer.segmentation) for explainer in session.explainers.values())
    pieces = [segment_variants(job, batch, plan, specs, piece, 2)[0] for piece in (0, 1)]
    made = {spec: [segments_HW for piece in pieces for segments_HW in piece[spec]] for spec in specs}
    seen = set()
    for number, question in enumerate(plan.questions):
        image_CHW = session._variant_item(shard, question).image_CHW.numpy()
        assert image_CHW.dtype == batch.images_BCHW.dtype
        for spec in specs:
            np.testing.assert_array_equal(made[spec][number], segment(image_CHW, spec, patch_size=job.tokens.patch))
        seen.add(made[specs[0]][number].tobytes())
    if metric == "smooth_mprt":
        assert len(seen) > len(batch.ids), "the noisy copies' superpixels differ from the images' own"
    there, beside = (
        score_group(job, group, explained.explained, plan, session.answer(shard, plan, metric, segments), batch)
        for segments in (None, made)
    )
    assert any(score.status == "ok" for score in there)
    assert there == beside
