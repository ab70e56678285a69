"""Environment variables of the process that runs the model. They must be set before torch is imported."""

from __future__ import annotations

# OpenMP's threads spin while they wait for each other, a few hundred times per step on a CPU. With anything else running on the
# same cores, the front end for one, a spinning thread keeps the one it waits for off the core: measured on two cores with two
# other busy processes, a step took 200-1,600 ms, against 80-110 ms with threads that sleep. A value set by the user stays.
ENGINE_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
