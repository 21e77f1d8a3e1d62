"""Offline: records and profiles, cascade search, certificates; later the simulator and the plan."""
