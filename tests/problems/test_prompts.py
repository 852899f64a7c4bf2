"""Prompts: strings for the reward, embeddings for the model, and statistics of each."""

import copy

import pytest
import torch
from runs import quick, same

import sdecontrol as sc

TEXTS = ["up", "far down", "left"]
TABLE = {"up": [0.0, 1.0, 0.5], "far down": [0.0, -2.0, 0.1], "left": [-1.0, 0.0, 0.2], "right": [1.0, 0.0, 0.3]}
#: where each wants to be, which the model is not told
AIMS = {"up": (0.0, 1.0), "far down": (0.0, -2.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}


def encoder(texts):
    return torch.tensor([TABLE[text] for text in texts])


def near(x, texts):
    assert isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    return -(x - torch.tensor([AIMS[text] for text in texts]).to(x)).square().sum(1)


def problem(condition=None, reward=near, seen=None):
    def drift(x, t, y):
        if seen is not None:
            seen.append(y)
        return -x + 0 * y[:, :2]

    condition = sc.Prompts(TEXTS, encoder) if condition is None else condition
    return sc.ControlProblem(
        sc.SDE(drift, 0.7, dim=2), sc.Dirac(torch.zeros(2)), reward=reward, condition=condition, alpha=0.3
    )


def test_the_reward_is_given_the_strings_of_the_embeddings_that_all_else_is_given():
    seen, told = [], []

    def reward(x, texts):
        told.append(texts)
        return near(x, texts)

    made = problem(reward=reward, seen=seen)
    paths = sc.simulate(made, 200, time_steps=3, seed=0)
    assert torch.equal(paths.log_weights(), paths.reward / 0.3) and torch.equal(seen[-1], paths.condition)
    assert torch.equal(encoder(told[-1]), paths.condition) and set(told[-1]) == set(TEXTS)
    assert torch.equal(paths.reward, near(paths.samples, told[-1]))
    counts = [told[-1].count(text) for text in TEXTS]
    assert min(counts) > 200 / 3 - 4 * (200 * 2 / 9) ** 0.5
    assert torch.equal(paths.condition[:100], sc.simulate(made, 100, time_steps=3, seed=0).condition)


def test_a_run_is_that_of_the_embeddings_as_a_tensor_and_has_each_prompt_s_mean():
    by_text = quick(problem(), sc.LogVariance(), iterations=3)

    def by_row(x, y):
        return near(x, [next(t for t in TEXTS if torch.equal(encoder([t])[0], row)) for row in y])

    by_tensor = quick(problem(encoder(TEXTS), by_row), sc.LogVariance(), iterations=3)
    assert same(by_text, by_tensor)
    assert set(by_text.history[0]) - set(by_tensor.history[0]) == {f"prompt/{text}" for text in TEXTS}
    solution = quick(problem(), sc.LogVariance(), iterations=120)
    for options in ({}, {"batch_size": 192}):
        found = solution.evaluate(900, seed=1, confirm=False, **options)
        paths = solution.simulate(900, seed=1, keep="end")
        which = solution.problem.condition.texts_of(paths.condition)
        for text in TEXTS:
            rows = torch.tensor([one == text for one in which])
            assert found.details[f"prompt/{text}"].value == pytest.approx(float(paths.reward[rows].mean()), abs=1e-5)
    last = solution.history[-1]
    assert all(last[f"prompt/{text}"] > solution.history[0][f"prompt/{text}"] for text in TEXTS)
    table = str(found)
    assert "  far down" in table and "reward at this prompt" in table


def test_the_means_of_prompts_and_of_rewards_make_up_the_whole():
    def long(x, texts):
        return x[:, 0] + x.new_tensor([len(text) for text in texts])

    several = sc.WeightedRewards({"near": near, "long": (0.1, long)})
    history = quick(problem(reward=several), sc.RewardBackprop(), iterations=2, accumulate=2).history
    for metrics in history:
        total = metrics["reward/near"] + 0.1 * metrics["reward/long"]
        assert total == pytest.approx(metrics["reward"], abs=1e-5)
        low, high = (f(metrics[f"prompt/{text}"] for text in TEXTS) for f in (min, max))
        assert low < metrics["reward"] < high


def test_samples_are_asked_for_by_string_and_new_strings_are_encoded():
    asked = []

    def counted(texts):
        asked.extend(texts)
        return encoder(texts)

    solution = quick(problem(sc.Prompts([*TEXTS, "up"], counted)), sc.LogVariance(), iterations=1)
    assert asked == TEXTS  # once each
    one = solution.sample(64, seed=1, condition="left")
    assert torch.equal(one, solution.sample(64, seed=1, condition=encoder(["left"])[0].expand(64, 3)))
    each = solution.sample(3, seed=1, condition=["left", "right", "left"])
    assert each.shape == (3, 2) and asked == [*TEXTS, "right"]
    assert torch.equal(each[::2], one[:3:2])
    rewards = solution.simulate(2, seed=0, condition=["right", "up"]).reward
    assert rewards.shape == (2,)
    assert sc.simulate(solution.problem, 2, time_steps=2, seed=0, condition=["right", "up"]).reward.shape == (2,)
    with pytest.raises(TypeError, match=r"strings are of a problem with condition=sc.Prompts"):
        quick(problem(encoder(TEXTS), lambda x, y: x[:, 0]), iterations=1).sample(2, condition="up")
    with pytest.raises(ValueError, match="condition must have 3 rows"):
        solution.simulate(3, seed=0, condition=["right", "up"])


def test_a_text_listed_twice_is_drawn_twice_as_often():
    prompts = sc.Prompts(["up", "up", "left"], encoder)
    share = prompts.texts_of(problem(prompts).draw_condition(3000, 0)).count("up") / 3000
    assert prompts.texts == ["up", "left"] and abs(share - 2 / 3) < 4 * (2 / 9 / 3000) ** 0.5


def test_embeddings_are_known_again_among_many_and_where_their_keys_agree():
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(500, 7, 16, generator=generator)
    prompts = sc.Prompts([str(i) for i in range(500)], lambda texts: table[[int(t) for t in texts]], batch_size=64)
    order = torch.randperm(500, generator=generator)
    assert torch.equal(prompts.indices(table[order]), order)
    tied = torch.tensor([[1.0, 0.0], [1.0, 1e-12], [1.0, 3e-12]])  # what tells them apart is lost in any sum
    prompts = sc.Prompts(["a", "b", "c"], lambda texts: tied[["abc".index(t) for t in texts]])
    assert prompts.texts_of(tied[[2, 0, 1, 1]]) == ["c", "a", "b", "b"]
    with pytest.raises(ValueError, match="an embedding that is of none of the prompts"):
        prompts.indices(tied[:1] + 1)


def test_class_labels_and_half_precision_are_embeddings_too():
    labels = sc.Prompts(["zero", "one"], lambda texts: torch.tensor([["zero", "one"].index(t) for t in texts]))
    assert labels.embeddings.dtype == torch.int64 and labels.texts_of(torch.tensor([1, 1, 0])) == ["one", "one", "zero"]
    half = sc.Prompts(TEXTS, lambda texts: encoder(texts).bfloat16())
    assert half.embeddings.dtype == torch.float32 and half.texts_of(half.embeddings[[2, 0]]) == ["left", "up"]


def test_an_encoder_that_is_a_module_is_called_without_dropout_or_gradients():
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Linear(3, 3)

        def forward(self, texts):
            assert not self.training
            return self.table(encoder(texts))

    module = Encoder()
    prompts = sc.Prompts(TEXTS, module)
    assert module.training and not prompts.embeddings.requires_grad
    assert copy.deepcopy(problem(prompts)).condition is prompts


def test_of_many_prompts_none_is_reported_in_every_iteration():
    many = [str(i) for i in range(65)]
    prompts = sc.Prompts(many, lambda texts: torch.tensor([[float(t), 1.0] for t in texts]))
    solution = quick(problem(prompts, lambda x, texts: x[:, 0] + x.new_tensor([float(t) for t in texts])), iterations=1)
    assert not [name for name in solution.history[0] if "/" in name]
    found = solution.evaluate(2000, seed=1, confirm=False)
    assert len(found.details) == 65
    shown = [line for line in str(found).splitlines() if "at this prompt" in line]
    assert [line.split()[0] for line in shown] == ["0", "1", "2", "3", "4", "60", "61", "62", "63", "64"]


def test_a_solution_is_saved_with_its_prompts_and_loaded(tmp_path):
    solution = quick(problem(), sc.LogVariance(), iterations=2)
    solution.save(tmp_path)
    again = sc.load(tmp_path, problem())
    assert torch.equal(again.sample(5, seed=1, condition="up"), solution.sample(5, seed=1, condition="up"))
    with pytest.raises(sc.BadFileError, match="belongs to another problem"):
        sc.load(tmp_path, problem(sc.Prompts(["up", "right"], encoder)))


BAD = {
    "one string": (lambda: sc.Prompts("up", encoder), TypeError, "texts must be a list of strings"),
    "no strings": (lambda: sc.Prompts([1, 2], encoder), TypeError, "texts must be a list of strings"),
    "none": (lambda: sc.Prompts([], encoder), ValueError, "at least one string"),
    "no encoder": (lambda: sc.Prompts(TEXTS, TABLE), TypeError, "encoder must be callable"),
    "a list": (lambda: sc.Prompts(TEXTS, lambda t: [0.0] * len(t)), TypeError, "got a list"),
    "too few": (lambda: sc.Prompts(TEXTS, lambda t: torch.zeros(1, 3)), TypeError, r"each of 3 texts, got \(1, 3\)"),
    "nan": (lambda: sc.Prompts(TEXTS, lambda t: encoder(t) / 0), ValueError, "not finite, of 3 of 3 texts"),
    "one for all": (
        lambda: sc.Prompts(TEXTS, lambda t: torch.ones(len(t), 2)),
        ValueError,
        "gives 'up' and 'far down' the same embedding",
    ),
    "strings without an encoder": (lambda: problem(TEXTS), TypeError, r"sc.Prompts\(texts, encoder\)"),
    "labels": (
        lambda: problem(reward=sc.LogProb(torch.nn.Linear(2, 3), None)),
        TypeError,
        "needs labels as the problem's condition",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prompts_are_refused_by_name(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
