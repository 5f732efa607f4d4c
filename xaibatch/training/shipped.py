"""A work folder comes in; the embedded classifier, made again from rendered poses, goes out with its held-out accuracy.

This loop is not the training job's (`training/fit.py`, which Ray Train runs). That one trains on single labelled
images; the curriculum here needs a pose's lesion films and their twin in one step, under one augmentation and one
choice of patches, and a loss between their logits: see `training/twins.py`. Single images left a small ViT near chance.

Shape letters: P poses, T films of a pose (two COVID-like, two pneumonia-like, the lesion-free twin last), H W pixels.
"""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from xaibatch.data.preprocess import Preprocessing
from xaibatch.simulate.options import CLASSES, COVID_LIKE, PNEUMONIA_LIKE, SimulationOptions
from xaibatch.simulate.radiograph import RadiographSimulator
from xaibatch.simulate.volume import load_volume
from xaibatch.training.checkpoint import write_bytes, write_checkpoint
from xaibatch.training.metrics import describe
from xaibatch.training.twin_training import Progress, TwinTrainer, predicted
from xaibatch.training.twins import TwinRecipe

LESIONS: Final = (COVID_LIKE, COVID_LIKE, PNEUMONIA_LIKE, PNEUMONIA_LIKE)
LABELS_T: Final = (*(CLASSES.index(name) for name in LESIONS), len(CLASSES) - 1)
TRAIN_SEED: Final = 11
TRAIN_POSES: Final = (*range(300), *range(380, 780))
"""Poses that the shipped classifier was trained on."""
HELD_OUT_SEED: Final = 12
HELD_OUT_POSES: Final = tuple(range(80))
DEVIATION: Final = (
    "trained by a loop of its own (training/shipped.py), not by the training job (jobs/train.py), whose batches of "
    "single images cannot hold a pose's films together with their twin"
)
"""For the record: where this classifier was made otherwise than a user's would be."""
EMBEDDED_SEED: Final = 48
"""Seed of the 48 embedded radiographs: no pose is shared with training."""
MEAN: Final = 0.5218
STD: Final = 0.2751
"""Of every tenth training pose, grey in [0, 1]."""
RECIPE: Final = TwinRecipe(num_steps=1500, kept_patches=((0.5, 49), (0.85, 98), (1.0, 196)))
CHUNK: Final = 20
STEPS_BETWEEN_SAVES: Final = 100


def rendered(folder: Path, seed: int, poses: Sequence[int], num_processes: int) -> NDArray[np.uint8]:
    """Films (P,T,H,W) uint8 of the poses; parts of twenty poses are kept in `folder` and not rendered again."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [tuple(poses[k : k + CHUNK]) for k in range(0, len(poses), CHUNK)]
    paths = [folder / f"poses-{seed}-{chunk[0]:05d}-{len(chunk)}.npy" for chunk in chunks]
    work = [(path, seed, chunk) for path, chunk in zip(paths, chunks, strict=True) if not path.is_file()]
    if work:
        load_volume()
        with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
            for number, _ in enumerate(pool.imap_unordered(_render, work), start=1):
                print(f"rendered {number} of {len(work)} parts of {CHUNK} poses", flush=True)
    return np.concatenate([np.load(path) for path in paths])


def make(work: Path, output: Path, *, num_processes: int, seed: int = 1, recipe: TwinRecipe = RECIPE) -> None:
    """Render, train and write the classifier to `output`; resumes from what `work` holds."""
    rendered(work, TRAIN_SEED, TRAIN_POSES, num_processes)
    held_out = rendered(work, HELD_OUT_SEED, HELD_OUT_POSES, num_processes)
    context = multiprocessing.get_context("spawn")
    meeting = work / f"meeting-{multiprocessing.current_process().pid}"
    workers = [
        context.Process(target=_train, args=(work, recipe, seed, rank, num_processes, meeting))
        for rank in range(num_processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    meeting.unlink(missing_ok=True)
    if any(worker.exitcode for worker in workers):
        raise RuntimeError("a training process ended with an error: the same call again resumes")
    state = torch.load(work / "state.pt", weights_only=True)["average"]
    write_shipped(output, state, held_out, recipe, seed)


def write_shipped(
    output: Path,
    state: dict[str, Tensor],
    held_out_PTHW: NDArray[np.uint8],
    recipe: TwinRecipe,
    seed: int,
    notes: str = "",
) -> dict[str, Any]:
    """Write the float16 checkpoint and, beside it, a JSON record with what it reaches on held-out films."""
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=len(CLASSES))
    model.load_state_dict({name: value.half().float() for name, value in state.items()})
    reached = accuracy(model, held_out_PTHW)
    size = held_out_PTHW.shape[-1]
    preprocessing = Preprocessing(
        image_size=(size, size), resize_short=size, mean=(MEAN,), std=(STD,), grey=True, source="checkpoint metadata"
    )
    record = {
        "model": "vit_tiny_patch16_224",
        "notice": "synthetic, not for clinical use",
        "made_by": "jobs/train_embedded.py: from scratch, on simulated radiographs and their twins, no masks",
        "deviation": DEVIATION,
        "poses": f"{len(TRAIN_POSES)} of seed {TRAIN_SEED}",
        "seed": seed,
        "recipe": recipe.model_dump(mode="json"),
        "held_out": {key: reached[key] for key in ("accuracy", "recall", "twins_called_normal", "num_films")},
        "notes": notes,
    }
    write_checkpoint(output, state, CLASSES, preprocessing, record=record, dtype=torch.float16)
    content = json.dumps({**record, "detail": reached}, indent=2) + "\n"
    write_bytes(output.with_suffix(".record.json"), content.encode())
    return reached


def accuracy(model: torch.nn.Module, films_PTHW: NDArray[np.uint8]) -> dict[str, Any]:
    """Numbers on one film of each class and pose, and how many lesion films turn normal when the twin replaces them."""
    num_poses = len(films_PTHW)
    chosen = torch.from_numpy(films_PTHW[:, [0, 2, 4]])
    logits = predicted(model, chosen.flatten(0, 1), mean=MEAN, std=STD)
    labels = np.tile(np.arange(3), num_poses)
    numbers = describe(logits.softmax(1).numpy(), labels, CLASSES)
    answers = logits.argmax(1).view(num_poses, 3)
    was_lesion = (answers[:, :2] == torch.arange(2)).flatten()
    twin_normal = (answers[:, 2:] == 2).expand(-1, 2).flatten()
    return {
        **numbers,
        "num_films": 3 * num_poses,
        "recall": {name: row["recall"] for name, row in numbers["per_class"].items()},
        "twins_called_normal": f"{int((was_lesion & twin_normal).sum())} of {int(was_lesion.sum())} "
        "rightly classified lesion films",
    }


def _render(task: tuple[Path, int, tuple[int, ...]]) -> None:
    path, seed, poses = task
    torch.set_num_threads(1)
    simulator = RadiographSimulator(load_volume(), SimulationOptions(), seed)
    films = []
    for pose in poses:
        made = simulator.films(pose, LESIONS)
        films.append(np.concatenate([made.films_FHW, made.twin_HW[None]]))
    partial = path.with_suffix(".part.npy")
    np.save(partial, np.stack(films))
    partial.replace(path)


def _train(work: Path, recipe: TwinRecipe, seed: int, rank: int, world: int, meeting: Path) -> None:
    """One process of the training; the first one saves and speaks."""
    torch.set_num_threads(1)
    if world > 1:
        distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    films = torch.from_numpy(rendered(work, TRAIN_SEED, TRAIN_POSES, 1))
    trainer = TwinTrainer(films, torch.tensor(LABELS_T), recipe, mean=MEAN, std=STD, seed=seed)
    path = work / "state.pt"
    if path.is_file():
        trainer.load_state(torch.load(path, weights_only=True))
    while trainer.step < recipe.num_steps:
        trainer.run(trainer.step + STEPS_BETWEEN_SAVES, _spoken() if rank == 0 else lambda _: None)
        if rank == 0:
            partial = path.with_suffix(".part")
            torch.save(trainer.state(), partial)
            partial.replace(path)
    if world > 1:
        distributed.destroy_process_group()


def _spoken() -> Callable[[Progress], None]:
    def speak(progress: Progress) -> None:
        if progress.step % 25 == 0:
            terms = "  ".join(f"{name} {value:.3f}" for name, value in progress.terms.items())
            print(
                f"step {progress.step}/{progress.num_steps}  contrast {progress.contrast:.2f}  "
                f"patches {progress.num_kept}  {terms}",
                flush=True,
            )

    return speak
