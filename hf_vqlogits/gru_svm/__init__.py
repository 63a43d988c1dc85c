"""GRU-SVM: a recurrent network whose output layer is a support vector machine, or softmax.

Agarap (2017), "A Neural Network Architecture Combining Gated Recurrent Unit (GRU) and Support
Vector Machine (SVM) for Intrusion Detection in Network Traffic Data". Importing `hf_vqlogits`
registers the model with the Auto classes; see docs/gru_svm.md.
"""

from .configuration_gru_svm import GRUSVMConfig
from .feature_extraction_gru_svm import GRUSVMFeatureExtractor
from .modeling_gru_svm import GRUSVMForSequenceClassification
from .nsl_kdd import nsl_kdd_schema
from .onnx_export import export_onnx
from .records import RecordError, RecordProblem, TrafficRecords, read_records
from .schema import RecordSchema
from .squared_hinge import l2_svm_objective, squared_hinge

__all__ = [
    "GRUSVMConfig",
    "GRUSVMFeatureExtractor",
    "GRUSVMForSequenceClassification",
    "RecordError",
    "RecordProblem",
    "RecordSchema",
    "TrafficRecords",
    "export_onnx",
    "l2_svm_objective",
    "nsl_kdd_schema",
    "read_records",
    "squared_hinge",
]
