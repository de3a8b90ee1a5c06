"""Activations as FP8 e4m3 with one scale for each 128 values of a row."""

from tidemill.kernels.act_quant.reference import Quantized, act_quant, dequantize, swiglu_quant

__all__ = ["Quantized", "act_quant", "dequantize", "swiglu_quant"]
