"""Gaussian mixture of experts with a dense-to-sparse gate.

`mixture.py`, and the gates one level up, are the mathematics; `em.py` and `scoring.py` fit many
mixtures at once; `modeling_gaussian_moe.py` is one mixture as a model of Transformers; `voronoi.py`
measures how far fitted parameters are from true ones. See docs/gaussian_moe.md.
"""

from .configuration_gaussian_moe import GaussianMoEConfig
from .fitting import fit_em
from .modeling_gaussian_moe import GaussianMoEModel
from .temperature import TemperatureSchedule

__all__ = ["GaussianMoEConfig", "GaussianMoEModel", "TemperatureSchedule", "fit_em"]
