"""Conversion of dense output layers into vector-quantised ones."""

from .convert import convert_to_vq
from .errors import ConversionError
from .report import ConversionReport

__all__ = ["ConversionError", "ConversionReport", "convert_to_vq"]
