import errno
import json
import os
import stat

import pytest

from hf_vqlogits.conversion import checkpoint
from hf_vqlogits.conversion.checkpoint import check_output, check_room, whole_or_nothing
from hf_vqlogits.conversion.errors import ConversionError


def conversion(folder):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vqlogits"}))
    return folder


def write_and_fail(output, error):
    with whole_or_nothing(output) as partial:
        (partial / "file").write_text("x")
        raise error


def test_new_folder_appears_with_ordinary_permissions(tmp_path):
    with whole_or_nothing(tmp_path / "a" / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"
    assert os.listdir(tmp_path / "a") == ["out"]
    umask = checkpoint._umask()
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error):
        write_and_fail(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_earlier_output_survives_an_error_and_is_replaced_after_success(tmp_path):
    out = conversion(tmp_path / "out")
    with pytest.raises(OSError, match="broken"):
        write_and_fail(out, OSError("broken"))
    assert os.listdir(out) == ["config.json"]
    with whole_or_nothing(out) as partial:
        (partial / "file").write_text("x")
    assert os.listdir(out) == ["file"]
    assert os.listdir(tmp_path) == ["out"]


def test_full_disk_is_told_and_leaves_nothing(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ConversionError, match="disk filled up .* nothing was left"):
        write_and_fail(tmp_path / "out", full)
    assert os.listdir(tmp_path) == []


def test_existing_output_needs_overwrite(tmp_path):
    out = conversion(tmp_path / "out")
    with pytest.raises(ConversionError, match="exists; choose another .* `--overwrite`"):
        check_output(out, overwrite=False, source_name="gpt2")
    check_output(out, overwrite=True, source_name="gpt2")
    check_output(tmp_path / "new" / "folder", overwrite=False, source_name="gpt2")


def test_overwrite_never_deletes_what_is_no_conversion(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years of work")
    with pytest.raises(ConversionError, match="not the output of an earlier conversion"):
        check_output(tmp_path / "thesis", overwrite=True, source_name="gpt2")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="not the output of an earlier conversion"):
        check_output(tmp_path / "file", overwrite=True, source_name="gpt2")


def test_source_folder_is_never_the_output(tmp_path):
    out = conversion(tmp_path / "out")
    with pytest.raises(ConversionError, match="the source model's own folder"):
        check_output(out, overwrite=True, source_name=str(out))


def test_no_room_on_the_disk(tmp_path):
    check_room(tmp_path / "out", 1)
    with pytest.raises(ConversionError, match="No room on the disk .* MB are needed"):
        check_room(tmp_path / "out", 10**18)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConversionError, match="cannot be written"):
        check_output(tmp_path / "out", overwrite=False, source_name="gpt2")
