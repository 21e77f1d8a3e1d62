"""Shared vocabulary, artefact files, pure policy, the local Triton launcher and the load generator."""

__version__ = "0.1.0"
