"""Checkpoints: a consistent cut of a store in files, and back. See docs/checkpoints.md.

:mod:`~kvstore.checkpoint.cut` says what a cut is to those who write it, :mod:`~kvstore.checkpoint.directory` how it
gets into a directory whole or not at all, :mod:`~kvstore.checkpoint.manifest` what lies where, and
:mod:`~kvstore.checkpoint.tensors` the bytes. How a cut comes about is decided in :mod:`kvstore.protocol.cutting`.
"""
