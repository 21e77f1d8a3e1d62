"""The tiny family's plan with a certificate, and with the probe rows that its models answer as recorded."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from cascadeserve.probes import pack_inputs
from tests.fakes.tiny import LABEL_OFFSET, plan_document, rows

CERTIFICATE = {
    "epsilon": 0.004,
    "delta": 0.05,
    "rows": 1000,
    "method": "made up",
    "ladder_digest": "sha256:0",
    "records_digest": "sha256:1",
    "reference_accuracy": 0.9,
}
PROBES = rows([1, 2, 3], [0.9, 0.25, 0.5])


def certified_document(endpoints: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    """As plain data, to be changed by tests."""
    document = plan_document(endpoints)
    family = document["families"]["family"]
    family["ladder"][0]["epsilon"] = 0.0
    family["ladder"][1]["epsilon"] = 0.004
    family["certificate"] = CERTIFICATE | {
        "probes": {
            "inputs": base64.b64encode(pack_inputs({"x": PROBES})).decode(),
            "answers": {
                model: {
                    "label": (PROBES[:, 0].astype(np.int64) + LABEL_OFFSET[model]).tolist(),
                    "certainty": PROBES[:, 1].tolist(),
                }
                for model in ("small", "large")
            },
        },
    }
    return document


def probes_of(document: dict[str, Any]) -> dict[str, Any]:
    """The probe rows in such a document."""
    probes: dict[str, Any] = document["families"]["family"]["certificate"]["probes"]
    return probes
