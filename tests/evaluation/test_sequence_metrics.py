"""Distances between sets of sequences, against counts by hand and the expected distance of exact draws."""

import math

import pytest
import torch
from cases import F64

import sdecontrol as sc
from sdecontrol.processes.finite import FiniteLaw, StateSpace

LAW = FiniteLaw(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64), StateSpace(2, (2,)))


def test_total_variation_is_half_the_sum_of_differences():
    x = torch.tensor([[0, 0], [0, 0], [1, 1], [1, 0]])  # shares .5, 0, .25, .25
    assert sc.metrics.total_variation(x, LAW) == pytest.approx(0.5 * (0.4 + 0.2 + 0.05 + 0.15), abs=1e-15)
    assert sc.metrics.total_variation(torch.zeros(3, 2, dtype=torch.int64), LAW) == pytest.approx(0.9, abs=1e-15)


def test_total_variation_of_draws_is_what_is_said():
    torch.manual_seed(0)
    n, p = 4096, LAW.probs
    found = sum(sc.metrics.total_variation(LAW.sample((n,)), LAW) for _ in range(50)) / 50
    assert found == pytest.approx(float((p * (1 - p) / (2 * math.pi * n)).sqrt().sum()), rel=0.15)


def test_spectra_count_words_in_order():
    x = torch.tensor([[0, 1, 2], [0, 1, 1]])  # 01 12 01 11
    spectrum = sc.metrics.kmer_spectrum(x, 3, k=2).reshape(3, 3)
    assert spectrum[0, 1] == 0.5 and spectrum[1, 2] == 0.25 and spectrum[1, 1] == 0.25 and spectrum.sum() == 1
    y = torch.tensor([[0, 1]])
    assert sc.metrics.kmer_distance(x, y, 3, k=2) == pytest.approx(0.5)
    assert sc.metrics.kmer_distance(x, x.flip(1), 3, k=1) == 0.0 < sc.metrics.kmer_distance(x, x.flip(1), 3, k=2)


def test_correlation_of_spectra_is_pearsons():
    x, y = torch.tensor([[0, 1, 2], [0, 1, 1]]), torch.tensor([[0, 1, 0, 2], [2, 1, 1, 0]])
    spectra = torch.stack([sc.metrics.kmer_spectrum(z, 3, k=2) for z in (x, y)])
    assert sc.metrics.kmer_correlation(x, y, 3, k=2) == pytest.approx(float(torch.corrcoef(spectra)[0, 1]), abs=1e-12)
    assert sc.metrics.kmer_correlation(x, x, 3, k=2) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="all words are equally frequent"):
        sc.metrics.kmer_correlation(torch.tensor([[0, 1, 2]]), x, 3, k=1)


def test_diversity_counts_edits_of_all_pairs():
    x = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0], [0, 1, 2, 3]])  # a shift: one deletion, one insertion
    assert sc.metrics.edit_diversity(x) == pytest.approx((2 + 0 + 2) / 3 / 4)
    assert sc.metrics.edit_diversity(x[::2]) == 0.0
    assert sc.metrics.edit_diversity(x, most=2) == pytest.approx(0.5)
    torch.manual_seed(0)
    y = torch.randint(3, (40, 7))
    pairs = [(a, b) for i, a in enumerate(y.tolist()) for b in y.tolist()[:i]]
    assert sc.metrics.edit_diversity(y) == pytest.approx(sum(edits(a, b) for a, b in pairs) / len(pairs) / 7)


def edits(a, b):
    """The Levenshtein distance by its recursion."""
    last = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        row = [i]
        for j, right in enumerate(b, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (left != right)))
        last = row
    return last[-1]


def test_bad_input_is_named():
    x = torch.tensor([[0, 1, 1]])
    with pytest.raises(TypeError, match="law must be a single FiniteLaw"):
        sc.metrics.total_variation(x, LAW.probs)
    with pytest.raises(ValueError, match="samples must have shape"):
        sc.metrics.total_variation(x, LAW)
    with pytest.raises(TypeError, match="samples must be int64"):
        sc.metrics.kmer_spectrum(x.float(), 2)
    with pytest.raises(ValueError, match="samples has tokens from -1 to 0"):
        sc.metrics.kmer_spectrum(x - 1, 2)
    with pytest.raises(ValueError, match="k must be 3 at most"):
        sc.metrics.kmer_spectrum(x, 2, k=4)
    with pytest.raises(ValueError, match="samples must have at least two rows"):
        sc.metrics.edit_diversity(x)
    with pytest.raises(TypeError, match="samples must be int64"):
        sc.metrics.edit_diversity(x.float())
    with pytest.raises(ValueError, match="samples has tokens from -1"):
        sc.metrics.edit_diversity(torch.tensor([[0, -1], [0, 1]]))
