"""Use the built wheel from an empty folder: python tests/check_wheel.py DIST.

Not a pytest module: it needs the wheel that `make wheel-test` builds from the sdist. In the
checkout itself the folder `hf_vqlogits/` would hide what the wheel lacks.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import sys
from pathlib import Path

import evaluate
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import hf_vqlogits
from hf_vqlogits.conversion import convert_to_vq
from hf_vqlogits.conversion.perplexity import FOLDER
from hf_vqlogits.ops import cpu

installed = Path(sys.argv[1])
assert Path(hf_vqlogits.__file__).is_relative_to(installed), hf_vqlogits.__file__
assert (installed / "hf_vqlogits" / "py.typed").exists()
assert Path(FOLDER).is_relative_to(installed), FOLDER
evaluate.load(str(FOLDER))
model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64))
report = convert_to_vq(
    model, output="vq", bits=24, calibration_data="self", calibration_tokens=1000
)
loaded = AutoModelForCausalLM.from_pretrained("vq")
assert loaded(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 300)
print("wheel works, kernel:", cpu.paths())
"""


def main() -> None:
    """Install the wheel beside an empty folder and run the check there."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    (sdist,) = Path(sys.argv[1]).resolve().glob("*.tar.gz")
    print("checking", wheel.name, "built from", sdist.name)
    with tempfile.TemporaryDirectory() as scratch:
        installed, empty = Path(scratch) / "installed", Path(scratch) / "empty"
        empty.mkdir()
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        subprocess.run([*pip, "--no-deps", "--target", str(installed), str(wheel)], check=True)
        environment = {
            **os.environ,
            "PYTHONPATH": str(installed),
            "HF_HOME": str(Path(scratch) / "hub"),
            "HF_HUB_OFFLINE": "1",
        }
        python = [sys.executable, "-c", CHECK, str(installed)]
        subprocess.run(python, cwd=empty, env=environment, check=True)
        command = [sys.executable, str(installed / "bin" / "convert_to_vq"), "--help"]
        subprocess.run(command, cwd=empty, env=environment, check=True, capture_output=True)


if __name__ == "__main__":
    main()
