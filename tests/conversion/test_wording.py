from hf_vqlogits.conversion.wording import megabytes, milliseconds, ratio


def test_units():
    assert megabytes(154_389_504) == "154.4 MB"
    assert megabytes(1_500) == "1.5 kB"
    assert [milliseconds(s) for s in (0.00012345, 0.9994, 12.5)] == [
        "0.123 ms",
        "999 ms",
        "12,500 ms",
    ]
    assert ratio(3, 3, "less", "more") == "1x less"
