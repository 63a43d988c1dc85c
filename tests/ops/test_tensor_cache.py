import copy
import gc
import threading
import time

import pytest
import torch

from hf_vqlogits.ops.tensor_cache import TensorCache


@pytest.fixture
def cache():
    return TensorCache()


def look_up(cache, tensor, key="key"):
    """The sum of the tensor, and whether it was made anew."""
    calls = []

    def make():
        calls.append(1)
        return int(tensor.sum())

    return cache.get(tensor, key, make), bool(calls)


def test_a_value_is_made_once_per_tensor_and_key(cache):
    tensor = torch.ones(3)
    assert look_up(cache, tensor) == (3, True)
    assert look_up(cache, tensor) == (3, False)
    assert look_up(cache, tensor, "other key") == (3, True)
    assert look_up(cache, torch.ones(3)) == (3, True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.add_(1),
        lambda t: t[0].fill_(7),
        lambda t: t.view(-1)[1:].zero_(),
        lambda t: t.resize_(2),
        lambda t: t.set_(torch.full((4,), 5.0)),
        lambda t: setattr(t, "data", torch.full((4,), 5.0)),
        lambda t: torch.nn.init.constant_(t, 9),
    ],
)
def test_edits_in_place_are_noticed(cache, edit):
    tensor = torch.ones(4)
    look_up(cache, tensor)
    edit(tensor)
    assert look_up(cache, tensor) == (int(tensor.sum()), True)
    assert len(cache) == 1


def test_loading_a_state_dict_is_noticed(cache):
    module = torch.nn.Module()
    module.register_buffer("codes", torch.zeros(4))
    look_up(cache, module.codes)
    module.load_state_dict({"codes": torch.ones(4)})
    assert look_up(cache, module.codes) == (4, True)


def test_copies_have_values_of_their_own_and_carry_none(cache):
    tensor = torch.ones(4)
    look_up(cache, tensor)
    twin = copy.deepcopy(tensor)
    assert look_up(cache, twin) == (4, True)
    assert vars(twin) == vars(tensor) == {}


def test_values_die_with_their_tensor(cache):
    tensor = torch.ones(4)
    look_up(cache, tensor)
    look_up(cache, tensor, "other key")
    assert len(cache) == 2
    del tensor
    gc.collect()
    assert len(cache) == 0


def test_memory_that_is_used_again_is_another_tensor(cache):
    for step in range(20):  # the allocator hands out the same address again and again
        assert look_up(cache, torch.full((1000,), step)) == (1000 * step, True)


def test_a_tensor_in_the_place_of_a_dead_one_is_told_apart(cache, monkeypatch):
    monkeypatch.setattr(cache, "_forgetter", lambda place: None)
    storage, key = torch.ones(4), "key"
    tensor = storage.view(4)
    look_up(cache, tensor, key)
    dead = id(tensor)
    del tensor
    for _ in range(100):  # until Python uses the object's memory again
        tensor = storage.view(4)
        if id(tensor) == dead:
            break
    assert look_up(cache, tensor, key) == (4, True)


def test_tensors_that_count_no_edits_are_told_apart():
    assert TensorCache.can_hold(torch.ones(1))
    with torch.inference_mode():
        assert not TensorCache.can_hold(torch.ones(1))


def test_one_thread_makes_what_many_want(cache):
    tensor, calls = torch.ones(1), []

    def make():
        calls.append(1)
        time.sleep(0.05)
        return "value"

    def work():
        assert cache.get(tensor, "key", make) == "value"

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_values_of_several_tensors_follow_all_of_them(cache):
    tensor, other = torch.ones(3), torch.ones(2)

    def look_up(other):
        calls = []

        def make():
            calls.append(1)
            return int(tensor.sum() + other.sum())

        return cache.get(tensor, "key", make, (other,)), bool(calls)

    assert look_up(other) == (5, True)
    assert look_up(other) == (5, False)
    other += 1
    assert look_up(other) == (7, True)
    tensor += 1
    assert look_up(other) == (10, True)
    assert look_up(other.clone()) == (10, True)
    assert look_up(torch.zeros(2)) == (6, True)
    assert len(cache) == 1
