"""The KServe datatypes as numpy has them, little-endian as on the wire whatever the host is."""

from __future__ import annotations

from typing import Any

import numpy as np

# those whose elements all have one size
FIXED_SIZE: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    # numpy has no bfloat16: its bits are carried as uint16
    "BF16": np.dtype("<u2"),
}
