import math

from matplotlib.figure import Figure

from benchmarks.factor_axis import FLOOR, TICKS, factor_axis, height


def test_heights_are_nats_above_a_floor():
    assert height(2.0) == math.log(2)
    assert height(0.9) == height(1.0) == math.log(FLOOR)


def test_ticks_say_factors():
    panel = Figure().subplots()
    panel.plot([height(1.2), height(3.0)])
    factor_axis(panel)
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["x1.0005 or less", *(f"x{factor:g}" for factor in TICKS)]
    assert list(panel.get_yticks()) == [math.log(factor) for factor in (FLOOR, *TICKS)]
