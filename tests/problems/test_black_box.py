"""Rewards as people have them: images, arrays, single samples; slow and failing ones."""

import copy
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import plain_rewards
import pytest
import torch
from runs import TESTS, quick, same

import sdecontrol as sc

X = torch.linspace(-1.3, 1.3, 5 * 3 * 4 * 2).reshape(5, 3, 4, 2)


def given(x=X, y=None, **options):
    """What a function is given, for all samples or one by one."""
    seen = []

    def function(*arguments):
        seen.append(arguments)
        return 0.0 if options.get("per_sample") else [0.0] * len(x)

    sc.BlackBox(function, **options)(*((x,) if y is None else (x, y)))
    return seen


# ------------------------------------------------------------------------------------------------ what goes in


def test_images_are_bytes_between_black_and_white():
    ((levels,),) = given(inputs="uint8")
    assert levels.shape == (5, 4, 2, 3) and levels.dtype == np.uint8
    wanted = ((X.double() / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # as pipelines have it
    assert np.array_equal(levels, wanted.numpy())
    ((other,),) = given(inputs="uint8", limits=(0.0, 1.0))
    assert np.array_equal(other, (X.double().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    ((white,),) = given(-X, inputs="uint8", limits=(1.0, -1.0))  # ink in a negative
    assert np.array_equal(white, levels)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA"), (None, "L")])
def test_images_of_pil_have_the_same_bytes(channels, mode):
    shape = (2, 4, 6) if channels is None else (2, channels, 4, 6)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ((pictures,),), ((levels,),) = given(x[:2], inputs="pil"), given(x[:2], inputs="uint8")
    for picture, own in zip(pictures, levels):
        assert picture.mode == mode and picture.size == (6, 4)
        assert np.array_equal(np.asarray(picture), own.squeeze(-1) if channels == 1 else own)


def test_numbers_come_as_they_are_and_are_not_the_path_s_own():
    ((array,),), ((tensor,),) = given(inputs="numpy"), given(inputs="torch")
    assert isinstance(array, np.ndarray) and np.array_equal(array, X.numpy()) and torch.equal(tensor, X)
    before = X.clone()

    def careless(x):
        x *= 0
        return x.reshape(len(x), -1)[:, 0]

    for inputs in ("numpy", "torch"):
        assert torch.equal(sc.BlackBox(careless, inputs=inputs)(X), torch.zeros(5)) and torch.equal(X, before)


def test_single_samples_come_with_their_own_condition():
    y = torch.arange(5)
    found = given(y=y, inputs="numpy", per_sample=True)
    assert [int(label) for _, label in found] == [0, 1, 2, 3, 4]
    assert all(np.array_equal(x, own) for (x, _), own in zip(found, X.numpy()))
    ((_, whole),) = given(y=y, inputs="torch")
    assert torch.equal(whole, y)
    ((_, texts),) = given(y=list("abcde"), inputs="numpy")
    assert texts == list("abcde")
    assert [text for _, text in given(y=list("abcde"), inputs="pil", per_sample=True)] == list("abcde")


# ------------------------------------------------------------------------------------------------ what comes out

VALUES = [0.1, -2.5, 3.0, 1e-3, 7.0]
RETURNED = {
    "floats": lambda: VALUES,
    "a tuple of 0-d tensors": lambda: tuple(torch.tensor(VALUES)),
    "float64": lambda: np.array(VALUES),
    "a column": lambda: np.array(VALUES)[:, None],
    "float32 with a graph": lambda: torch.tensor(VALUES).requires_grad_(),
    "numpy's own numbers": lambda: [np.float32(v) for v in VALUES],
}


@pytest.mark.parametrize("kind", RETURNED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_whatever_is_returned_is_a_number_for_each_sample(kind, dtype):
    found = sc.BlackBox(lambda x: RETURNED[kind]())(X.to(dtype))
    assert found.dtype == dtype and not found.requires_grad
    assert torch.allclose(found, torch.tensor(VALUES, dtype=dtype), rtol=1e-6)
    coarse = sc.BlackBox(lambda x: torch.tensor(VALUES).bfloat16())(X)
    assert torch.equal(coarse, torch.tensor(VALUES).bfloat16().float())
    assert sc.BlackBox(lambda x: [1, 2])(torch.zeros(2, 3, dtype=torch.int64)).dtype == torch.get_default_dtype()


BAD_RETURNS = {
    "too few": (lambda x: VALUES[:3], r"samples 0 to 4: ValueError: it returned 3 numbers for 5 samples"),
    "one for all": (lambda x: 1.0, r"it returned numbers of shape \(\) for 5 samples"),
    "nan": (lambda x: [1.0, 2.0, float("nan"), 1.0, float("nan")], "failed at sample 2: it returned nan"),
    "text": (lambda x: ["good"] * 5, "TypeError: it returned a list of 5, and is to return a number for each"),
    "rewards and metadata": (lambda x: (VALUES, {}), "TypeError: it returned a tuple of 2"),
    "an error": (lambda x: {}["mode"], r"samples 0 to 4: KeyError: 'mode' \(.*test_black_box.py, line"),
}


@pytest.mark.parametrize("kind", BAD_RETURNS)
def test_a_reward_that_fails_names_the_sample_and_the_cause(kind):
    function, match = BAD_RETURNS[kind]
    with pytest.raises(sc.RewardError, match=match):
        sc.BlackBox(function)(X)


def asked_for(*kinds):
    return torch.tensor([[float(kind), 10.0 + i] for i, kind in enumerate(kinds)])


CAUSES = {
    1: "OSError: no connection",
    4: "it returned nan",
    5: "it returned 2 numbers for 1 samples",
    6: "it returned a str",
}


@pytest.mark.parametrize("kind", CAUSES)
@pytest.mark.parametrize("workers", [1, 3])
def test_the_first_of_single_samples_that_fails_is_named(kind, workers):
    reward = sc.BlackBox(plain_rewards.troubled, inputs="numpy", per_sample=True, workers=workers)
    with pytest.raises(sc.RewardError, match=f"reward failed at sample 2: .*{CAUSES[kind]}") as caught:
        reward(asked_for(0, 0, kind, 0, 1))
    assert caught.value.index == 2 and (kind != 1 or isinstance(caught.value.__cause__, OSError))
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.index == 2


def test_failing_samples_may_get_a_number_of_their_own():
    reward = sc.BlackBox(plain_rewards.troubled, inputs="numpy", per_sample=True, on_failure=-1.0)
    with pytest.raises(sc.RewardError, match="it has never returned a number"):
        reward(asked_for(1, 1))
    with pytest.warns(RuntimeWarning, match=r"2 samples so far, .*on_failure=-1; now at sample 1: OSError"):
        assert reward(asked_for(0, 1, 4, 0)).tolist() == [10.0, -1.0, -1.0, 13.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward(asked_for(0, 1)).tolist() == [10.0, -1.0]  # not told again at once
    assert reward.failures == 3


def test_a_thread_that_is_too_slow_is_not_waited_for():
    reward = sc.BlackBox(plain_rewards.troubled, inputs="numpy", per_sample=True, workers=2, timeout=1.0)
    with pytest.raises(sc.RewardError, match=r"sample 1: it took longer than timeout=1 seconds"):
        reward(asked_for(0, 3, 0))
    assert reward(asked_for(0, 0)).tolist() == [10.0, 11.0]


# ------------------------------------------------------------------------------------------------ workers


def test_threads_are_at_it_at_the_same_time_and_answers_keep_their_order():
    barrier = threading.Barrier(3)  # nobody goes on before all three are there

    def together(x):
        barrier.wait(timeout=30)
        return x.sum()

    x = torch.arange(12.0).reshape(6, 2)
    assert torch.equal(sc.BlackBox(together, per_sample=True, workers=3)(x), x.sum(1))
    parts = []

    def batch(x):
        parts.append(len(x))
        return x.sum(1)

    assert torch.equal(sc.BlackBox(batch, workers=4)(x), x.sum(1)) and sorted(parts) == [2, 2, 2]


def test_processes_answer_as_threads_do_and_one_that_dies_or_is_slow_is_replaced():
    options = {"inputs": "numpy", "per_sample": True, "workers": 2}
    alone = sc.BlackBox(plain_rewards.troubled, pool="process", timeout=5.0, on_failure=-1.0, **options)
    x = asked_for(0, 0, 0, 0, 0)
    assert torch.equal(alone(x), sc.BlackBox(plain_rewards.troubled, **options)(x))
    with pytest.warns(RuntimeWarning, match=r"now at sample 1: its process ended in the midst of it, with exit code 7"):
        assert alone(asked_for(0, 2, 3, 0, 1)).tolist() == [10.0, -1.0, -1.0, 13.0, -1.0]
    assert alone(x).tolist() == x[:, 1].tolist()
    alone.close()
    raising = sc.BlackBox(plain_rewards.troubled, pool="process", **options)
    with pytest.raises(sc.RewardError, match=r"sample 1: OSError: no connection \(.*plain_rewards.py, line"):
        raising(asked_for(0, 1, 3, 3, 3))  # and nobody waits for the others
    raising.close()


def test_the_same_processes_are_asked_again_and_copies_have_their_own():
    reward = sc.BlackBox(plain_rewards.process_id, inputs="numpy", pool="process")
    first, again = reward(X), reward(X)
    assert torch.equal(first, again) and len(set(first.tolist())) == 1
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        assert other(X)[0] != first[0]
        other.close()
    reward.close()
    assert reward(X)[0] != first[0]
    reward.close()


def test_a_function_that_no_process_can_be_sent_is_refused_at_once():
    with pytest.raises(ValueError, match=r"pool='process': the function cannot be sent .* or use pool='thread'"):
        sc.BlackBox(lambda x: x, pool="process")
    sc.BlackBox(lambda x: x, pool="thread")


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import plain_rewards, torch
import sdecontrol as sc
if __name__ == "__main__":
    reward = sc.BlackBox(plain_rewards.troubled, inputs="numpy", per_sample=True, workers=2, pool="process")
    print(reward(torch.zeros(2, 2)).tolist(), flush=True)
    if sys.argv[1] == "busy":
        import threading
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        reward(torch.full((2, 2), 3.0))
    elif sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "raised":
        raise SystemExit(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("ended", 0), ("raised", 3), ("killed", -9), ("busy", -9)])
def test_no_worker_outlives_its_run(how, code, tmp_path):
    """They hold its standard output: the pipe ends when the last of them has."""
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=TESTS))
    done = subprocess.run([sys.executable, str(script), how], capture_output=True, text=True, timeout=120)
    assert done.returncode == code and done.stdout == "[0.0, 0.0]\n", done.stderr


@pytest.mark.slow
def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(KILLED.format(tests=TESTS).replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run([sys.executable, str(script), "ended"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "`if __name__ == '__main__':` around what it runs" in done.stderr


# ------------------------------------------------------------------------------------------------ in a problem


def problem(reward, **options):
    sde = sc.OrnsteinUhlenbeck(2)
    return sc.ControlProblem(sde, sc.Dirac(torch.zeros(2)), reward=reward, alpha=0.5, **options)


def upward(x):
    return (x[:, 0] > 0.3) * 2.0  # numbers without rounding


def test_a_run_is_that_of_the_same_reward_in_torch():
    options = {"method": sc.SoftPPO(), "iterations": 3}
    in_torch = quick(problem(lambda x: (x[:, 0] > 0.3).to(x) * 2), **options)
    boxed = quick(problem(sc.BlackBox(upward, inputs="numpy", workers=2)), **options)
    assert same(in_torch, boxed) and in_torch.history == boxed.history
    assert not boxed.problem.has_gradient
    with pytest.raises(sc.NotDifferentiable, match="reward has no gradient to go by"):
        quick(boxed.problem, sc.RewardBackprop())


def test_pieces_and_copies_know_which_sample_failed():
    def picky(x):
        return 1.0 if x[0] < 100 else None

    made = problem(sc.BlackBox(picky, per_sample=True), reward_batch_size=2)
    x = torch.zeros(7, 2)
    x[4:, 0] = 200
    for own in (made, copy.deepcopy(made)):
        with pytest.raises(sc.RewardError, match="sample 4: it returned nan") as caught:
            own.reward(x)
        assert caught.value.index == 4


def test_a_reward_that_fails_in_training_leaves_the_last_good_solution(tmp_path):
    calls = []

    def limited(x):
        calls.append(len(x))
        if calls.count(64) > 3:
            raise ConnectionError("quota used up")
        return x[:, 0]

    stopped = r"quota used up.* Training stopped at iteration 3; .*checkpoint"
    with pytest.raises(sc.RewardError, match=stopped) as caught:
        quick(problem(sc.BlackBox(limited)), sc.SoftPPO(), checkpoint_dir=tmp_path)
    kept = []

    class Third:
        def on_step_end(self, state):
            if state.iteration == 3:
                kept.append(state.solution())

    whole = quick(problem(lambda x: x[:, 0].detach()), sc.SoftPPO(), callbacks=[Third()])
    assert same(caught.value.solution, kept[0])
    again = problem(sc.BlackBox(lambda x: x[:, 0]))  # as it is after the night
    assert same(quick(again, sc.SoftPPO(), checkpoint_dir=tmp_path, resume=True), whole)


def test_a_plain_function_of_lists_is_told_of_the_box():
    with pytest.raises(TypeError, match=r"reward must return a torch tensor, got list.*sc.BlackBox\(function\)"):
        problem(lambda x: [0.0] * len(x))
    with pytest.raises(sc.RewardError, match="sample 0: OSError: no connection"):  # when the problem is made
        problem(sc.BlackBox(lambda x: plain_rewards.troubled([1]), per_sample=True))


BAD = {
    "no function": (lambda: sc.BlackBox(3), TypeError, "function must be callable"),
    "an input": (lambda: sc.BlackBox(upward, inputs="image"), ValueError, "unknown inputs 'image'"),
    "a pool": (lambda: sc.BlackBox(upward, pool="processes"), ValueError, "did you mean 'process'"),
    "workers": (lambda: sc.BlackBox(upward, workers=0), ValueError, "workers must be an int >= 1"),
    "a timeout": (lambda: sc.BlackBox(upward, timeout=0), ValueError, "timeout must be a finite number > 0"),
    "limits": (lambda: sc.BlackBox(upward, limits=1.0), TypeError, "limits must be two numbers"),
    "equal limits": (lambda: sc.BlackBox(upward, limits=(1, 1)), ValueError, "two different numbers"),
    "a failure": (lambda: sc.BlackBox(upward, on_failure="skip"), ValueError, "on_failure must be 'raise' or"),
    "an infinite one": (lambda: sc.BlackBox(upward, on_failure=-float("inf")), ValueError, "on_failure must be finite"),
    "images of vectors": (lambda: sc.BlackBox(upward, inputs="pil")(X[:, 0, 0]), ValueError, r"shape \(2,\)"),
    "images of tokens": (lambda: sc.BlackBox(upward, inputs="uint8")(X.long()), ValueError, "are integers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_by_name(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call()
