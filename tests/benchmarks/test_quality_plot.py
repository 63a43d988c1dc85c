from benchmarks.peers.catalogue import FAMILIES
from benchmarks.quality_plot import MARKERS, plot


def test_panels_of_all_peers_lossless_ones_too(tmp_path):
    rows = [
        {"model": model, "peer": peer, "setting": setting, "bytes": 1e6 * (1 + i), "factor": factor}
        for model in ("a", "b")
        for i, peer in enumerate(FAMILIES)
        for setting, factor in (("small", 1.3), ("large", 0.9999))
    ]
    path = tmp_path / "plot.png"
    plot(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_family_has_a_marker():
    assert len(set(MARKERS)) >= len(FAMILIES)
