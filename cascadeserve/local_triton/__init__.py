"""A real tritonserver on this machine, from the binary that the nvidia-pytriton wheel carries.

That server (2.51) predates security fixes of 2025 and 2026 and must only ever be reachable over loopback; production
runs a current container instead, on the same model repository.
"""
