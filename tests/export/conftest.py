from __future__ import annotations

import importlib.util

# Without the [export] extra these files cannot be imported; loading a family needs no PyTorch.
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = [
        "test_cli.py",
        "test_graph.py",
        "test_heads.py",
        "test_onnx_export.py",
        "test_parity.py",
        "test_variants.py",
        "test_verify.py",
        "test_own_models.py",
        "test_export_bad_input.py",
    ]
