"""SwiGLU experts over tokens sorted by expert."""

from tidemill.kernels.expert_mlp.reference import Expert, expert_mlp, gather_rows, scatter_rows

__all__ = ["Expert", "expert_mlp", "gather_rows", "scatter_rows"]
