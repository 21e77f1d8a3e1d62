"""What Triton has and this server has not, each with the sentence that its paths and its RPCs answer."""

from __future__ import annotations

_LOADING = "models are loaded and unloaded by the gear plan, not by clients"
_SHARED_MEMORY = "shared memory is not offered; send tensors in the request"
_TRACING = "trace settings are not offered; trace the servers behind this one"
_LOGGING = "log settings are not offered; the log of this server is set where it is started"
_GENERATE = "the generate extension is not offered; use infer"

# method and path over HTTP -> sentence
PATHS = {
    ("POST", "/v2/repository/{repository}/index"): "'repository_name' specification is not supported",
    ("POST", "/v2/repository/models/{model}/load"): _LOADING,
    ("POST", "/v2/repository/models/{model}/unload"): _LOADING,
    ("POST", "/v2/repository/{repository}/models/{model}/load"): _LOADING,
    ("POST", "/v2/repository/{repository}/models/{model}/unload"): _LOADING,
    **{
        (method, f"/v2/{kind}sharedmemory{part}"): _SHARED_MEMORY
        for kind in ("system", "cuda")
        for method, part in (
            ("GET", "/status"),
            ("GET", "/region/{region}/status"),
            ("POST", "/unregister"),
            ("POST", "/region/{region}/register"),
            ("POST", "/region/{region}/unregister"),
        )
    },
    **{
        (method, path): sentence
        for method in ("GET", "POST")
        for path, sentence in (
            ("/v2/trace/setting", _TRACING),
            ("/v2/models/{model}/trace/setting", _TRACING),
            ("/v2/logging", _LOGGING),
        )
    },
    **{
        ("POST", f"/v2/models/{{model}}{version}/{verb}"): _GENERATE
        for version in ("", "/versions/{version}")
        for verb in ("generate", "generate_stream")
    },
}

RPCS = {
    "RepositoryModelLoad": _LOADING,
    "RepositoryModelUnload": _LOADING,
    "SystemSharedMemoryStatus": _SHARED_MEMORY,
    "SystemSharedMemoryRegister": _SHARED_MEMORY,
    "SystemSharedMemoryUnregister": _SHARED_MEMORY,
    "CudaSharedMemoryStatus": _SHARED_MEMORY,
    "CudaSharedMemoryRegister": _SHARED_MEMORY,
    "CudaSharedMemoryUnregister": _SHARED_MEMORY,
    "TraceSetting": _TRACING,
    "LogSettings": _LOGGING,
}
