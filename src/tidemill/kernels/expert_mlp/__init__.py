"""SwiGLU experts over tokens sorted by expert."""

from tidemill.kernels.expert_mlp.reference import (
    Expert,
    SortedRows,
    expert_mlp,
    gather_rows,
    scatter_rows,
)

__all__ = ["Expert", "SortedRows", "expert_mlp", "gather_rows", "scatter_rows"]
