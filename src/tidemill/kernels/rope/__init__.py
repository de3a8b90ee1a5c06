"""Rotary position embedding."""

from tidemill.kernels.rope.reference import apply_rope

__all__ = ["apply_rope"]
