"""Several HTTP processes before one engine.

::

                         main process: FrontEndManager
                owns the listening socket, the engine and the front ends
                   │ State, Collect, Answer ▲ Loaded, Snapshot, Scrape, ...
                   ▼                        │
    clients ──▶ front end 0 ─┐   (all accept from one socket)
    clients ──▶ front end 1 ─┼── Submit, Abort ──▶ engine process
    clients ──▶ front end 2 ─┘ ◀── Outputs ──

Tokens never pass the main process. It tells each front end of the engine's ups and downs and of a drain, restarts one that dies,
and answers what must be one truth: /metrics.
"""
