from benchmarks import markdown


def test_tables_are_markdown():
    made = markdown.table("a | b", [["1", "2"], ["3", "4"]])
    assert made == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"
    assert (markdown.times(1.2345), markdown.times(66.454)) == ("x1.234", "x66.5")
    assert (markdown.precise(1.23456), markdown.precise(2.3456)) == ("x1.2346", "x2.346")


def test_a_results_file_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(markdown, "RESULTS", tmp_path)
    assert not markdown.is_there("speed")
    (tmp_path / "speed.json").write_text('{"rows": []}')
    assert markdown.is_there("speed")
    assert markdown.results("speed") == {"rows": []}
