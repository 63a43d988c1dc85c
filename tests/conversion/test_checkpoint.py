import errno
import json
import os
import resource
import shutil
import stat

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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
    umask = os.umask(0)
    os.umask(umask)
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


# What Python, safetensors and tokenizers raise on a file system without room.
FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception("No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL, ids=["python", "quota", "safetensors", "tokenizers"])
def test_full_disk_is_told_and_leaves_nothing(tmp_path, error):
    with pytest.raises(ConversionError, match="disk filled up .* nothing was left .* Free some"):
        write_and_fail(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def files_of_a_kilobyte():
    """No file can be longer than that, as though the disk ended there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_safetensors_itself_raises_is_told(tmp_path, files_of_a_kilobyte):
    with (
        pytest.raises(ConversionError, match="/out' cannot be written: File too large; nothing"),
        whole_or_nothing(tmp_path / "out") as partial,
    ):
        save_file({"a": torch.zeros(10_000)}, partial / "model.safetensors")
    assert os.listdir(tmp_path) == []


OTHER = [
    SafetensorError("a fault of the program"),
    ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    OSError(errno.ENOENT, "No such file or directory"),
]


@pytest.mark.parametrize("error", OTHER, ids=["program", "connection", "no name"])
def test_errors_that_are_not_of_the_disk_pass(tmp_path, error):
    with pytest.raises(type(error), match="fault of the program|reset by peer|No such file"):
        write_and_fail(tmp_path / "out", error)
    assert os.listdir(tmp_path) == []


def test_a_file_elsewhere_is_named_and_the_output_is_not_blamed(tmp_path):
    with (
        pytest.raises(ConversionError, match="While '.*/out' was .*, '.*/gone' failed: No such f"),
        whole_or_nothing(tmp_path / "out") as partial,
    ):
        shutil.copyfile(tmp_path / "gone", partial / "file")
    assert os.listdir(tmp_path) == []
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache"))
    with pytest.raises(ConversionError, match="'.*/cache' failed: No space left on device; noth"):
        write_and_fail(tmp_path / "out", error)


def test_a_file_in_the_output_is_blamed_on_it(tmp_path):
    with (
        pytest.raises(ConversionError, match="/out' cannot be written: Is a directory; nothing"),
        whole_or_nothing(tmp_path / "out") as partial,
    ):
        partial.write_text("x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "The disk filled up while"),
        (errno.EIO, "'.*/tokens' or '.*/new/tokens' failed: Input/output error"),
    ],
)
def test_a_copy_names_two_files_of_which_one_is_to_blame(tmp_path, monkeypatch, code, message):
    def fails(*_):
        raise OSError(code, os.strerror(code))

    (tmp_path / "tokens").write_text("x")
    monkeypatch.setattr(os, "sendfile", fails)  # shutil adds the names
    monkeypatch.setattr(os, "lseek", lambda *_: 1)
    with (
        pytest.raises(ConversionError, match=message),
        whole_or_nothing(tmp_path / "out") as partial,
    ):
        shutil.copyfile(tmp_path / "tokens", partial / "tokens")
    assert os.listdir(tmp_path) == ["tokens"]


def test_a_parent_that_cannot_be_made_is_blamed_on_the_output(tmp_path):
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConversionError, match="/out' cannot be written: Not a directory; nothing"),
        whole_or_nothing(tmp_path / "file" / "a" / "out"),
    ):
        pass


@pytest.mark.parametrize("with_content", [False, True])
def test_what_appears_at_the_output_meanwhile_is_not_deleted(tmp_path, with_content):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    if with_content:
        (other / "chapter").write_text("years of work")
    with (
        pytest.raises(ConversionError, match="Something else has made '.*/out' .* Choose another"),
        whole_or_nothing(out),
    ):
        other.rename(out)
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == (["chapter"] if with_content else [])


@pytest.mark.parametrize("after", [0, 1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_between_two_renames_the_earlier_output_is_put_back(tmp_path, monkeypatch, after, error):
    out, done, replace = conversion(tmp_path / "out"), [], os.replace

    def interrupted(source, target):
        if len(done) == after:
            done.append(None)
            raise error
        replace(source, target)
        done.append(None)
        if len(done) == after == 2:
            raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with (
        pytest.raises((KeyboardInterrupt, ConversionError), match="^$|cannot be written: Input"),
        whole_or_nothing(out) as partial,
    ):
        (partial / "file").write_text("x")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(out) == (["file"] if after == 2 else ["config.json"])


def test_an_earlier_output_that_cannot_be_put_back_is_not_deleted(tmp_path, monkeypatch):
    out, replace = conversion(tmp_path / "out"), os.replace

    def only_away(source, target):
        if source != out:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", only_away)
    with (
        pytest.raises(ConversionError, match="the earlier output is in '.*'; move it back") as info,
        whole_or_nothing(out),
    ):
        pass
    (scratch,) = tmp_path.iterdir()
    assert f"{str(scratch / 'earlier')!r}; move it back" in str(info.value)
    assert "nothing was left" not in str(info.value)
    assert os.listdir(scratch / "earlier") == ["config.json"]


def test_a_linked_output_is_replaced_where_it_lies(tmp_path):
    (tmp_path / "big").mkdir()
    real, link = conversion(tmp_path / "big" / "real"), tmp_path / "link"
    link.symlink_to(real)
    check_output(link, overwrite=True, source_name="gpt2")
    with whole_or_nothing(link) as partial:
        (partial / "file").write_text("x")
    assert link.is_symlink()
    assert os.listdir(real) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["big", "link"]
    assert os.listdir(tmp_path / "big") == ["real"]


def test_a_name_as_long_as_names_can_be(tmp_path):
    out = tmp_path / ("ü" * 127)
    check_output(out, overwrite=False, source_name="gpt2")
    with whole_or_nothing(out) as partial:
        (partial / "file").write_text("x")
    assert os.listdir(out) == ["file"]
    with pytest.raises(ConversionError, match="cannot be used: File name too long. Choose another"):
        check_output(tmp_path / ("x" * 256), overwrite=False, source_name="gpt2")


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file" / "out", tmp_path / "file" / "a" / "b"):
        with pytest.raises(ConversionError, match="would lie in '.*/file', which is no folder"):
            check_output(output, overwrite=True, source_name="gpt2")


def test_a_link_to_nothing(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for output in (tmp_path / "link", tmp_path / "link" / "out", tmp_path / "loop"):
        with pytest.raises(ConversionError, match="through the link .*, where nothing is; remove"):
            check_output(output, overwrite=True, source_name="gpt2")


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


def test_what_may_be_replaced_is_the_callers_to_say(tmp_path):
    out = conversion(tmp_path / "out")
    (tmp_path / "adapter").mkdir()
    check_output(
        tmp_path / "adapter", overwrite=True, source_name="gpt2", replaceable=lambda _: True
    )
    with pytest.raises(ConversionError, match="not the output of"):
        check_output(out, overwrite=True, source_name="gpt2", replaceable=lambda _: False)
    (out / "inner").mkdir()
    with pytest.raises(ConversionError, match="own folder, or holds it"):
        check_output(
            out, overwrite=True, source_name=str(out / "inner"), replaceable=lambda _: True
        )


def test_source_folder_is_never_the_output(tmp_path):
    out = conversion(tmp_path / "out")
    (tmp_path / "link").symlink_to(out)
    (out / "inner").mkdir()
    for source in (out, out / "inner", tmp_path / "link"):
        with pytest.raises(ConversionError, match="the source model's own folder, or holds it"):
            check_output(out, overwrite=True, source_name=str(source))
    check_output(out, overwrite=True, source_name=str(tmp_path))
    check_output(out, overwrite=True, source_name="")


def test_no_room_on_the_disk(tmp_path):
    check_room(tmp_path / "out", 1)
    with pytest.raises(ConversionError, match="No room on the disk .* MB are needed.* Free some"):
        check_room(tmp_path / "out", 10**18)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_parent(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConversionError, match="cannot be written"):
        check_output(tmp_path / "out", overwrite=False, source_name="gpt2")
