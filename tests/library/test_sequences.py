"""Tasks of sequence design: conditionals and laws against enumeration, motifs against counts by hand, folds against
ViennaRNA's own numbers, and what is bad named."""

import builtins
import itertools
import math

import pytest
import torch

import sdecontrol as sc
from sdecontrol.library import MarkovLetters, sequence_task
from sdecontrol.library.enhancers import EnhancerModel, Grammar, enhancer_model, enhancer_sequences
from sdecontrol.library.folding import folding_energies, paired_shares
from sdecontrol.library.motifs import Motifs, Occupancy, jaspar_counts

FIRST = torch.tensor([0.5, 0.2, 0.3])
MOVE = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.6, 0.1]])


def everything(letters: int, length: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(letters), repeat=length)))


def test_conditionals_of_a_markov_chain_are_those_of_its_joint_law():
    law, points = MarkovLetters(FIRST, MOVE, 4), everything(3, 4)
    p = torch.tensor([FIRST[a] * MOVE[a, b] * MOVE[b, c] * MOVE[c, d] for a, b, c, d in points.tolist()]).double()
    assert torch.allclose(law.log_prob(points).exp(), p, atol=1e-7)
    states = everything(4, 4)  # 3: the mask
    found = law(states, torch.zeros(len(states), dtype=torch.float64)).exp()
    for x, each in zip(states, found):
        given = ((x == points) | (x == 3)).all(1).double() * p
        expected = torch.stack([torch.bincount(points[:, j], given, 3) for j in range(4)]) / given.sum()
        assert torch.allclose(each[x == 3], expected[x == 3], atol=1e-7)


def test_draws_of_a_markov_chain_have_its_law():
    law, n = MarkovLetters(FIRST, MOVE, 3), 20000
    counts = torch.zeros(27).index_add(0, (law.sample(n, 0) * torch.tensor([9, 3, 1])).sum(1), torch.ones(n))
    p = law.log_prob(everything(3, 3)).exp()
    assert float(((counts - n * p) ** 2 / (n * p)).sum()) < 26 + 4 * math.sqrt(52)
    assert torch.equal(law.sample(5, 1), law.sample(5, 1)) and not torch.equal(law.sample(50, 1), law.sample(50, 2))


def test_relaxed_tokens_that_are_certain_give_the_same_and_a_gradient():
    law, x = MarkovLetters(FIRST, MOVE, 4), torch.tensor([[0, 3, 2, 3], [3, 3, 3, 1]])
    s = torch.zeros(2)
    z = torch.nn.functional.one_hot(x, 4).float().requires_grad_()
    assert torch.allclose(law(z, s), law(x, s), atol=1e-6)
    (slope,) = torch.autograd.grad(law(z, s)[0, 1, 2], z)
    assert float(slope[0, 2].abs().max()) > 0.1 and float(slope[1].abs().max()) == 0


def test_a_law_that_is_none_is_named():
    with pytest.raises(ValueError, match="move must be probabilities"):
        MarkovLetters(FIRST, 2 * MOVE, 4)
    with pytest.raises(ValueError, match="move"):
        MarkovLetters(FIRST, MOVE[:2], 4)


def test_motifs_are_scored_at_every_place_on_both_strands():
    counts = jaspar_counts("MA0035.5")
    assert counts.shape == (7, 4) and counts.argmax(1).tolist() == [1, 3, 0, 0, 3, 1, 3]  # CTAATCT, GATTAG backwards
    n = counts.sum(1, keepdim=True)
    odds = (4 * (counts + n.sqrt() / 4) / (n + n.sqrt())).log()
    x = torch.randint(4, (5, 12), generator=torch.Generator().manual_seed(0))
    (found,) = Motifs(["MA0035.5"])(torch.nn.functional.one_hot(x, 4).double())
    turned = 3 - x.flip(1)
    for i, j in itertools.product(range(5), range(6)):
        forward = sum(odds[k, x[i, j + k]] for k in range(7))
        backward = sum(odds[k, turned[i, 5 - j + k]] for k in range(7))
        assert found[i, :, j].tolist() == pytest.approx([float(forward), float(backward)], abs=1e-9)
    total = Occupancy(["MA0035.5"])(torch.nn.functional.one_hot(x, 4).double())
    assert torch.allclose(total, found.flatten(1).logsumexp(1))
    with pytest.raises(ValueError, match=r"has no 'MA9999\.1'"):
        jaspar_counts("MA9999.1")


def test_the_activity_of_enhancers_counts_sites_and_pairs():
    grammar, background = Grammar(), torch.full((200,), 1)  # CCCC...
    names = list(grammar.motifs.matrices)

    def best(name):
        return grammar.motifs.odds()[names.index(name)][0].argmax(0)

    def activity(*sites):
        x = background.clone()
        for at, site in sites:
            x[at : at + len(site)] = site
        return float(sc.OneHot(grammar, 4)(x.unsqueeze(0)))

    gata, tal, rest = best("MA0035.5"), best("MA0091.2"), best("MA0138.3")
    none, one = activity(), activity((50, gata))
    assert one > none + 0.3 and activity((50, rest)) < none - 0.5
    assert activity((50, 3 - gata.flip(0))) == pytest.approx(one, abs=0.05)  # the other strand
    assert one < activity((50, gata), (90, gata)) < none + 2 * (one - none)  # falling returns
    apart = activity((20, tal), (100, gata))
    assert all(activity((20, tal), (30 + gap, gata)) > apart + 0.5 for gap in (6, 10))
    assert activity((20, tal), (30 + 12, gata)) < apart + 0.1


def test_planted_sites_are_found_and_seeds_repeat():
    x = enhancer_sequences(512, 0)
    assert x.shape == (512, 200) and torch.equal(x, enhancer_sequences(512, 0))
    reward = sc.OneHot(Grammar(), 4)
    mixed = torch.stack([row[torch.randperm(200, generator=torch.Generator().manual_seed(0))] for row in x])
    assert float(reward(x).mean()) > float(reward(mixed).mean()) + 1.0
    motifs = Motifs(["MA0493.3"])  # which is in no pair
    strong = motifs(torch.nn.functional.one_hot(x, 4).float())[0] > 0.75 * motifs.highest[0]
    forward, backward = strong.sum((0, 2)).tolist()
    assert min(forward, backward) > 200 and 0.75 < forward / backward < 1.33


def test_folds_are_those_of_a_hairpin():
    (energy, none), (paired, free) = (f(["GGGGAAAACCCC", "AAAAAAAA"]) for f in (folding_energies, paired_shares))
    assert energy == pytest.approx(-5.4, abs=0.2) and none == 0.0
    assert paired == pytest.approx(8 / 12) and free == 0.0
    with pytest.raises(ValueError, match=r"sequences\[1\] must be letters A, C, G, U"):
        folding_energies(["ACGU", "ACGT"])


@pytest.mark.parametrize(("name", "package"), [("dna-8mer", "pyjaspar"), ("rna-utr", "RNA")])
def test_a_missing_package_names_its_extra(name, package, monkeypatch):
    real = builtins.__import__

    def without(wanted, *args, **kwargs):
        if wanted == package:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    jaspar_counts.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'sdecontrol\[bio\]'"):
        sequence_task(name)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["ACGTACGT", "ACGNACGT"], r"sequences\[1\] has the letter 'N' at 3; those of dna-8mer are A, C, G, T\."),
        (["ACGUACGT"], "DNA has T in the place of U"),
        (["ACGT"], "has 4 letters; those of dna-8mer have 8"),
        ([], "at least one"),
    ],
)
def test_letters_outside_of_the_alphabet_are_named(bad, message):
    with pytest.raises(ValueError, match=message):
        sequence_task("dna-8mer").encode(bad)


def test_strings_and_tokens_are_the_same():
    task = sequence_task("dna-8mer")
    assert task.decode(task.encode(["acgtTGCA", "AAAACCCC"])) == ["ACGTTGCA", "AAAACCCC"]
    with pytest.raises(TypeError, match="list of strings"):
        task.encode("ACGTACGT")
    with pytest.raises(TypeError, match=r"use encode\(strings\)"):
        task.log_likelihood("ACGTACGT")
    with pytest.raises(ValueError, match=r"\(n, 8\)"):
        task.naturalness(torch.zeros(3, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="dna-8mer"):
        sequence_task("dna-8mers")


def test_natural_sequences_are_natural_and_the_best_are_not():
    task = sequence_task("dna-8mer")
    own, best = task.naturalness(task.natural(4096, 5)), task.naturalness(task.encode(["GTAAACAT", "TACGTCAT"] * 50))
    assert own.kmer_correlation > 0.97 and own.log_likelihood == pytest.approx(own.natural_log_likelihood, abs=0.02)
    assert best.kmer_correlation < 0.5 and "3-mer correlation" in str(best)


@pytest.mark.slow
def test_the_bound_of_a_markov_chain_in_random_order_is_its_likelihood():
    """Masked letters' conditionals are of one law, so that the bound over orders is attained by the chain rule."""
    task = sequence_task("dna-8mer")
    x = task.natural(8, 0)
    exact = task.log_likelihood(x)
    law = task.model
    task.model = lambda *args: law(*args)  # a model of which no more is known
    assert torch.allclose(task.log_likelihood(x, draws=8000), exact, atol=0.12)


def test_black_box_stability_is_less_the_energy_and_the_card_says_what_is_real():
    task = sequence_task("rna-utr")
    x = task.natural(4, 0)
    assert task.reward(x).tolist() == pytest.approx([-e for e in folding_energies(task.decode(x))], abs=1e-5)
    assert "ViennaRNA" in task.card.real and "Markov" in task.card.made and task.card.version == 1
    assert sc.recommend(task.problem()).facts[1] == "the reward is a black box" or "black box" in str(
        sc.recommend(task.problem())
    )


@pytest.mark.slow
def test_the_exact_law_of_8mers_is_the_enumerated_tilt():
    task = sequence_task("dna-8mer")
    problem, x = task.problem(), everything(4, 8)
    log_p = task.log_likelihood(x) + task.reward(x).double() / task.card.alpha
    exact = sc.exact_solution(problem)
    assert float(exact.log_z) == pytest.approx(float(log_p.logsumexp(0)), abs=1e-5)
    assert float(exact.floor) < 1e-6
    end = exact.marginal(1.0)
    at = end.space.index(x)
    assert float((end.probs[at] - (log_p - log_p.logsumexp(0)).exp()).abs().max()) < 1e-6


def test_the_model_of_enhancers_is_small_and_takes_probabilities():
    model = EnhancerModel().eval()
    x, s = torch.randint(5, (2, 200)), torch.zeros(2)
    assert sum(p.numel() for p in model.parameters()) * 4 < 2e6
    assert torch.allclose(model(x, s), model(torch.nn.functional.one_hot(x, 5).float(), s), atol=1e-5)


@pytest.mark.slow
def test_the_model_of_enhancers_is_trained_once(tmp_path, monkeypatch):
    from sdecontrol.library import enhancers

    monkeypatch.setenv("SDECONTROL_CACHE", str(tmp_path))
    monkeypatch.setattr(enhancers, "ITERATIONS", 20)
    first = enhancer_model()
    monkeypatch.setattr(enhancers, "ITERATIONS", 1 << 40)  # never again
    again = enhancer_model()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    task = sequence_task("dna-enhancer")
    problem, x = task.problem(), task.natural(8, 0)
    assert not task.exact_likelihood
    tuned = sc.solve(problem, sc.RewardBackprop(gradient="adjoint"), iterations=1, batch_size=4, seed=0, progress=False)
    assert tuned.sample(2, seed=0).shape == (2, 200) and -2.0 < task.naturalness(x, natural=8).log_likelihood < -1.2
