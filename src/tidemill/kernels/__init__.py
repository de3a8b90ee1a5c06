"""Operators of the model: a folder's `__init__` chooses the path, `reference.py` is plain torch."""
