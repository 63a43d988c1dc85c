from benchmarks.gate_rates_plot import plot
from benchmarks.log_log import summarise


def test_a_panel_for_each_setting_without_slopes_too(tmp_path):
    errors = {100: [1.0, 2.0, 3.0], 1000: [0.3, 0.5, 0.6]}
    rows = [
        {"setting": setting, "quantity": quantity, **summarise(found)}
        for setting in ("plain-exact", "gelu-exact", "gelu-over")
        for quantity, found in (("Voronoi loss", errors), ("slopes", {100: [1.0]}), ("none", {}))
    ]
    path = tmp_path / "plot.png"
    plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
