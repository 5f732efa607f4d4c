"""A data set in, a seeded class-balanced sample or shards out; neither depends on the order in which files were
listed."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from xaibatch.data.dataset import DataSet
from xaibatch.errors import UsageError
from xaibatch.types import ImageRecord, Shard


def sample(dataset: DataSet, limit: int | None, seed: int) -> DataSet:
    """Return the set with at most `limit` images, as evenly over the classes as they allow; None: the set itself.

    Classes take turns in an order keyed by the seed, each giving its images in an order keyed by seed and image id; a
    class that is used up is passed over, and images without label come last. So a sample of n is part of the sample
    of n + 1, and adding images to one class changes no other's choice. `class_names` stay those of the whole set.
    Raises UsageError for a limit below one.
    """
    if limit is None or limit >= len(dataset.records):
        return dataset
    if limit < 1:
        raise UsageError(f"a sample needs at least one image, received a limit of {limit}")
    by_class: dict[str | None, list[ImageRecord]] = defaultdict(list)
    for record in dataset.records:
        by_class[record.label].append(record)
    unlabelled = sorted(by_class.pop(None, []), key=lambda record: _key(seed, "image", record.image_id))
    turns = [
        sorted(by_class[label], key=lambda record: _key(seed, "image", record.image_id))
        for label in sorted(
            (label for label in by_class if label is not None), key=lambda label: _key(seed, "class", label)
        )
    ]
    order = [record for turn in zip_longest(*turns) for record in turn if record is not None] + unlabelled
    chosen = tuple(sorted(order[:limit], key=lambda record: record.image_id))
    digest = hashlib.sha256("\n".join([dataset.checksum, *(record.image_id for record in chosen)]).encode()).hexdigest()
    return replace(
        dataset,
        records=chosen,
        checksum=digest,
        checksum_of=f"the sample's ids, and {dataset.checksum_of} of the whole set",
    )


def shards(records: Sequence[ImageRecord], shard_size: int) -> tuple[Shard, ...]:
    """Cut the records into consecutive shards of `shard_size`, the last one smaller where it does not divide.

    Raises UsageError for a size below one.
    """
    if shard_size < 1:
        raise UsageError(f"a shard needs at least one image, received {shard_size}")
    starts = range(0, len(records), shard_size)
    return tuple(
        Shard(index=index, records=tuple(records[start : start + shard_size])) for index, start in enumerate(starts)
    )


def _key(seed: int, kind: str, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{kind}:{name}".encode()).digest()
