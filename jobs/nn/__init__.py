"""Tensors only: the model, its losses. Nothing here knows of ranks or files."""
