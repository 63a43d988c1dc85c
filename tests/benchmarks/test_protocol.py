import torch

from benchmarks import protocol


def test_the_other_domain_is_calibrated_on_and_judged_by_different_lines(
    tiny_case, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        protocol, "tokenize", lambda text, _, limit: torch.tensor([*map(ord, text)][:limit])
    )
    (tmp_path / "wikitext2").mkdir()
    lines = [chr(97 + i) * 39 + "\n" for i in range(20)]
    (tmp_path / "wikitext2" / "valid.txt").write_text("".join(lines))
    case = protocol.other_domain(tiny_case, tmp_path)
    assert case.parts is tiny_case.parts
    assert case.calibration.shape[1] == tiny_case.calibration.shape[1]
    texts = (case.calibration, case.evaluation["wikitext2"])
    seen, judged = (set(map(chr, ids.unique())) for ids in texts)
    assert seen - {"\n"} == {chr(97 + i) for i in range(16)}
    assert judged - {"\n"} == {chr(97 + i) for i in range(16, 20)}
    assert torch.equal(case.evaluation["novels"], tiny_case.evaluation["novels"])
    assert list(tiny_case.evaluation) == ["novels"]
