"""What a gear plan will do under a load: discrete events on the decisions that the orchestrator takes."""

from planner.simulator.load import Load, draw_load
from planner.simulator.run import Simulation, Simulator

__all__ = ["Load", "Simulation", "Simulator", "draw_load"]
