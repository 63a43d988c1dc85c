import pytest
import torch

from benchmarks.work_folder import WorkFolder


def test_what_is_there_is_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": 0.1, "choices": [1, 2]}

    for _ in range(2):
        work = WorkFolder(tmp_path / "new" / "work", {"steps": 3, "rates": (1, 2)})
        assert work.result("run", make) == {"value": 0.1, "choices": [1, 2]}
        assert work.has("run")
        assert not work.has("other")
        state = work.tensors("head", lambda: make() | {"codes": torch.arange(3)})
        assert torch.equal(state["codes"], torch.arange(3))
    assert len(made) == 2


def test_an_interrupted_step_leaves_nothing(tmp_path):
    work = WorkFolder(tmp_path, {})

    def interrupt():
        raise KeyboardInterrupt

    for keep in (work.result, work.tensors):
        with pytest.raises(KeyboardInterrupt):
            keep("run", interrupt)
    with pytest.raises(TypeError, match="not JSON serializable"):
        work.result("run", lambda: {"value": object()})
    assert not work.has("run")
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_other_settings_are_refused(tmp_path):
    WorkFolder(tmp_path, {"steps": 3, "model": "a"})
    with pytest.raises(ValueError, match=r"other settings \(steps 3, not 4\); name another"):
        WorkFolder(tmp_path, {"steps": 4, "model": "a"})
