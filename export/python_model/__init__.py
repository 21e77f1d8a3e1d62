"""The Triton model that runs a family's preprocessing: `model.py` is copied into the repository, never imported."""
