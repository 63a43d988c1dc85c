"""Registration with the Auto classes of Transformers."""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..configuration_vqlogits import VQLogitsConfig
from ..gaussian_moe import GaussianMoEConfig, GaussianMoEModel
from ..gru_svm.configuration_gru_svm import GRUSVMConfig
from ..gru_svm.feature_extraction_gru_svm import GRUSVMFeatureExtractor
from ..gru_svm.modeling_gru_svm import GRUSVMForSequenceClassification
from ..modeling_vqlogits import VQLogitsForCausalLM, VQLogitsModel


def register() -> None:
    """Make the Auto classes, Trainer and pipelines know the models of this package."""
    AutoConfig.register(VQLogitsConfig.model_type, VQLogitsConfig, exist_ok=True)
    AutoModel.register(VQLogitsConfig, VQLogitsModel, exist_ok=True)
    AutoConfig.register(GaussianMoEConfig.model_type, GaussianMoEConfig, exist_ok=True)
    AutoModel.register(GaussianMoEConfig, GaussianMoEModel, exist_ok=True)
    AutoModelForCausalLM.register(VQLogitsConfig, VQLogitsForCausalLM, exist_ok=True)
    # Trainer's label smoother decides by this table whether labels are to be shifted, and the
    # text-generation pipeline whether it supports a class; `register` does not reach it.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[VQLogitsConfig.model_type] = VQLogitsForCausalLM.__name__
    AutoConfig.register(GRUSVMConfig.model_type, GRUSVMConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(
        GRUSVMConfig, GRUSVMForSequenceClassification, exist_ok=True
    )
    AutoFeatureExtractor.register(GRUSVMConfig, GRUSVMFeatureExtractor, exist_ok=True)
