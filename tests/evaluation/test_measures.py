"""Each measure against its paper's formula, written out over single numbers."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from finetune import keys
from finetune.evaluation import measures


def vectors(count: int, name: str, width: int = 5) -> Tensor:
    values = keys.normal((count, width), 0, "test", name)
    return values / values.norm(dim=1, keepdim=True)


def cosine(one: Tensor, other: Tensor) -> float:
    a, b = one.tolist(), other.tolist()
    length = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / length


def test_likeness_is_the_mean_pairwise_cosine_of_generated_and_real() -> None:
    generated, real = vectors(4, "generated"), vectors(3, "real")
    expected = sum(cosine(g, r) for g in generated for r in real) / 12
    assert float(measures.likeness(generated, real).mean()) == pytest.approx(expected, abs=1e-6)


def test_what_real_photos_reach_leaves_out_each_with_itself() -> None:
    real = vectors(4, "real")
    expected = np.mean([cosine(a, b) for a, b in combinations(real, 2)])
    assert measures.likeness_of_each_other(real) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(measures.likeness_of_each_other(real[:1]))


def test_fidelity_is_the_cosine_of_a_picture_and_its_own_prompt() -> None:
    pictures, prompts = vectors(3, "pictures"), vectors(3, "prompts")
    expected = [cosine(a, b) for a, b in zip(pictures, prompts, strict=True)]
    assert measures.fidelity(pictures, prompts).tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="3 pictures but 2 prompts"):
        measures.fidelity(pictures, prompts[:2])


def test_diversity_is_the_mean_distance_of_two_pictures() -> None:
    distances = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 6.0], [2.0, 6.0, 0.0]])
    assert measures.diversity(distances) == pytest.approx((1 + 2 + 6) / 3)
    assert distances[0, 1] == 1 and math.isnan(measures.diversity(distances[:1, :1]))
    assert measures.apart(distances).tolist() == [1.5, 3.5, 4.0], "whose mean it is"
    assert math.isnan(measures.apart(distances[:1, :1]))


def test_drift_is_nothing_for_the_same_pictures() -> None:
    base, tuned = vectors(3, "base"), vectors(3, "tuned")
    assert measures.drift(base, base).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    expected = [1 - cosine(a, b) for a, b in zip(base, tuned, strict=True)]
    assert measures.drift(tuned, base).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_planted_training_picture_is_found_and_others_raise_no_alarm() -> None:
    training = vectors(4, "training", 32)
    samples = torch.cat([vectors(5, "samples", 32), training[2:3]])
    found = measures.neighbours(samples, training)
    assert (found[0].sample, found[0].picture, found[0].alarm) == (5, 2, True)
    assert found[0].similarity == pytest.approx(1, abs=1e-6)
    limit = max(cosine(a, b) for a, b in combinations(training, 2))
    for one in found:
        near = [cosine(samples[one.sample], picture) for picture in training]
        assert one.similarity == pytest.approx(max(near), abs=1e-6)
        assert one.alarm == (max(near) > limit)
    assert sorted(one.sample for one in found) == list(range(6))
    assert [one.similarity for one in found] == sorted((one.similarity for one in found), reverse=True)


def test_a_training_picture_that_is_there_twice_hides_no_copy() -> None:
    training = vectors(3, "training", 32)
    twice = torch.cat([training, training[:1]])
    assert [one.alarm for one in measures.neighbours(training[:1], twice)] == [True]


def test_one_training_picture_alone_raises_no_alarm() -> None:
    training = vectors(1, "training")
    assert [one.alarm for one in measures.neighbours(training, training)] == [False]


def test_the_bootstrap_is_keyed_and_covers_the_mean() -> None:
    values = [0.1, 0.5, 0.2, 0.9, 0.4, 0.6]
    one, same, other = (measures.bootstrap(values, seed, "test") for seed in (0, 0, 1))
    assert one == same != other
    assert one.value == pytest.approx(0.45) and one.low < 0.45 < one.high and one.units == 6
    error = np.std(values) / math.sqrt(6)  # of the resampled mean, which is about normal
    assert one.high - one.low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_the_bootstrap_of_little() -> None:
    assert measures.bootstrap([0.3], 0, "test") == measures.Estimate(0.3, 0.3, 0.3, 1)
    assert measures.bootstrap([0.3, math.nan], 0, "test").units == 1
    assert math.isnan(measures.bootstrap([], 0, "test").value)


def test_bleeding_is_a_matrix_of_likeness() -> None:
    drawn, own = [vectors(2, "a"), vectors(3, "b")], [vectors(2, "c"), vectors(2, "d")]
    found = measures.bleed(drawn, own)
    for a in range(2):
        for b in range(2):
            assert found[a][b] == pytest.approx(np.mean([cosine(x, y) for x in drawn[a] for y in own[b]]), abs=1e-6)
