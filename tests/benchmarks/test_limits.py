import shutil

import pytest

from benchmarks import limits
from benchmarks.limits import Rates, lookups, measured_rates


@pytest.fixture
def little(monkeypatch):
    measured_rates.cache_clear()
    monkeypatch.setattr(limits, "READ_BYTES", 8 << 20)
    monkeypatch.setattr(limits, "ROUNDS", 1000)
    yield
    measured_rates.cache_clear()


def test_rates_are_those_of_a_machine(little):
    rates = measured_rates()
    assert 1e8 < rates.bytes_per_second < 1e13
    if shutil.which("c++"):
        assert 1e8 < rates.lookups_per_second < 1e14
    assert rates.to_dict() == vars(rates)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_look_ups_have_no_limit(little, monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    assert measured_rates().lookups_per_second is None


def test_the_least_time_of_a_call():
    rates = Rates(bytes_per_second=2e9, lookups_per_second=4e9)
    assert rates.seconds(moved_bytes=10_000, lookups=1000) == (5e-6, 2.5e-7)
    assert Rates(2e9, None).seconds(moved_bytes=10_000, lookups=1000) == (5e-6, None)


@pytest.mark.parametrize(
    ("path", "count"), [("avx512", 110 * 101), ("avx2", 110 * 126), ("plain", 0)]
)
def test_look_ups_of_a_path(path, count):
    assert lookups(100, 501, 10, path, 1) == count
    assert lookups(100, 501, 10, path, 3) == 3 * count


@pytest.mark.parametrize(
    ("codewords", "path", "count"),
    [(4, "avx512", 110 * 31), (16, "avx512", 110 * 62), (16, "avx2", 110 * 62), (33, "avx512", 0)],
)
def test_look_ups_of_index_codes(codewords, path, count):
    assert lookups(100, 62, 10, path, 1, codewords=codewords) == count
