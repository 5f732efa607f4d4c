"""Samples, shards and labels of a data set."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.image_files import count_labels
from xaibatch.data.dataset import DataSet
from xaibatch.data.labels import label_indices
from xaibatch.data.sampling import sample, shards
from xaibatch.errors import DataError, UsageError
from xaibatch.types import ImageRecord


def made_up(counts: dict[str | None, int]) -> DataSet:
    records = tuple(
        ImageRecord(image_id=f"{label}/{index:03}", path="x", label=label)
        for label, count in counts.items()
        for index in range(count)
    )
    names = tuple(sorted(label for label in counts if label))
    return DataSet(records=records, root="r", layout="folder", class_names=names, checksum="c", checksum_of="ids")


def test_a_sample_is_balanced_and_filled_from_larger_classes() -> None:
    assert count_labels(sample(made_up({"a": 50, "b": 9, "c": 20}), 12, 0)) == {"a": 4, "b": 4, "c": 4}
    assert count_labels(sample(made_up({"a": 50, "b": 2, "c": 20}), 12, 0)) == {"a": 5, "b": 2, "c": 5}
    assert sorted(count_labels(sample(made_up({"a": 50, "b": 9, "c": 20}), 11, 0)).values()) == [3, 4, 4]
    assert count_labels(sample(made_up({None: 50, "b": 9}), 12, 0)) == {"b": 9, None: 3}
    whole = made_up({"a": 3})
    assert sample(whole, 3, 0) is whole
    assert sample(whole, None, 0) is whole
    with pytest.raises(UsageError, match="received a limit of 0"):
        sample(whole, 0, 0)


@settings(max_examples=30, deadline=None)
@given(
    counts=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20), min_size=1),
    limit=st.integers(1, 40),
    seed=st.integers(0, 9),
    shuffle=st.randoms(use_true_random=False),
)
def test_a_sample_does_not_depend_on_the_listing_order(
    counts: dict[str | None, int], limit: int, seed: int, shuffle: random.Random
) -> None:
    dataset = made_up(counts)
    records = list(dataset.records)
    shuffle.shuffle(records)
    chosen = sample(dataset, limit, seed)
    again = sample(replace(dataset, records=tuple(records)), limit, seed)
    assert {r.image_id for r in chosen.records} == {r.image_id for r in again.records}
    assert len(chosen) == min(limit, sum(counts.values()))
    found = count_labels(chosen)
    # As even as it can be: a class has at most one image more than any other that is not used up.
    for label, total in counts.items():
        assert found.get(label, 0) == total or max(found.values()) - found.get(label, 0) <= 1
    smaller = {r.image_id for r in sample(dataset, max(limit - 1, 1), seed).records}
    assert smaller <= {r.image_id for r in chosen.records}


def test_samples_of_other_seeds_differ_and_have_their_own_checksum() -> None:
    dataset = made_up({"a": 50, "b": 50})
    one, two = sample(dataset, 10, 0), sample(dataset, 10, 1)
    assert [r.image_id for r in one.records] != [r.image_id for r in two.records]
    assert len({dataset.checksum, one.checksum, two.checksum}) == 3
    assert one.class_names == dataset.class_names


@settings(deadline=None)
@given(num=st.integers(0, 30), size=st.integers(1, 12))
def test_shards_are_consecutive_and_complete(num: int, size: int) -> None:
    records = made_up({"a": num}).records
    cut = shards(records, size)
    assert [record for shard in cut for record in shard.records] == list(records)
    assert [shard.index for shard in cut] == list(range(-(-num // size)))
    assert all(len(shard.records) == size for shard in cut[:-1])


def test_labels_match_exactly_first_then_without_case() -> None:
    assert label_indices(["COVID-19", "normal", None], ["Normal", "COVID-19"]).tolist() == [1, 0, -1]
    assert label_indices(["a", "A"], ["A", "a"]).tolist() == [1, 0]
    with pytest.raises(DataError) as caught:
        label_indices(["x", "Normal"], ["Normal", "COVID-19"])
    assert "does not know: 'x'" in str(caught.value)
    assert "Labels of the data: 'Normal', 'x'; classes of the model: 'Normal', 'COVID-19'" in str(caught.value)
    with pytest.raises(DataError):
        label_indices(["aA"], ["AA", "aa"])
