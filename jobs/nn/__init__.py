"""Tensors only: the model, its losses. Of ranks it knows the group that cuts a layer; nothing of files."""
