"""The engine: schedule, run, update; in process or in a process of its own."""
