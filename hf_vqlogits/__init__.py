"""Vector-quantised output layers for Hugging Face Transformers.

Importing the package registers its models with the Auto classes.
"""

from ._version import __version__
from .configuration_vqlogits import VQLogitsConfig
from .head import VQLogitsHead
from .integrations.transformers import register
from .mixture import VQLogitsMixtureHead
from .modeling_vqlogits import VQLogitsForCausalLM, VQLogitsModel

register()

__all__ = [
    "VQLogitsConfig",
    "VQLogitsForCausalLM",
    "VQLogitsHead",
    "VQLogitsMixtureHead",
    "VQLogitsModel",
    "__version__",
]
