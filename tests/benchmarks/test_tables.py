import pytest

from benchmarks import tables


def test_the_readme_is_what_the_results_say():
    text = tables.README.read_text(encoding="utf8")
    assert tables.rewrite(text) == text
    assert text.count("<!-- table: ") == len(tables.TABLES)


def test_tables_are_replaced_and_the_rest_stays(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: "| new |\n", "two": lambda: "| 2 |\n"})
    text = "a\n<!-- table: one -->\n| old |\n<!-- end -->\nb\n<!-- table: two -->\n<!-- end -->\nc"
    assert tables.rewrite(text) == (
        "a\n<!-- table: one -->\n| new |\n<!-- end -->\nb\n"
        "<!-- table: two -->\n| 2 |\n<!-- end -->\nc"
    )


def test_unknown_tables_are_refused():
    with pytest.raises(KeyError, match="three"):
        tables.rewrite("<!-- table: three -->\n<!-- end -->")


def test_tables_are_markdown():
    made = tables.table("a | b", [["1", "2"], ["3", "4"]])
    assert made == "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n"
    assert (tables.times(1.2345), tables.times(66.454)) == ("x1.234", "x66.5")
