from types import SimpleNamespace

import pytest
import torch

from benchmarks.peers import catalogue


@pytest.mark.parametrize(("width", "groups"), [(256, [128, 64, 32]), (576, [64, 32]), (96, [32])])
def test_torchao_has_groups_that_divide_the_width(width, groups):
    pytest.importorskip("torchao")
    layer = SimpleNamespace(weight=torch.randn(50, width))
    settings = [setting for setting, _ in catalogue.torchao(layer, quick=False)]
    assert settings == ["int8, scale a row", *(f"int4, groups of {group}" for group in groups)]
