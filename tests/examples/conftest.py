from __future__ import annotations

import importlib.util

collect_ignore_glob = [
    name
    for name, needed in (
        ("test_digits_data.py", "sklearn"),
        ("test_digits_family.py", "torch"),
        ("test_texts_family.py", "torch"),
    )
    if importlib.util.find_spec(needed) is None or importlib.util.find_spec("sklearn") is None
]
