"""Loaded by schemathesis: puts values that the app knows in place of others that the document allows as well, so that made-up
requests get past the first checks."""

from __future__ import annotations

import schemathesis

from tests.server.fakes import INFO


@schemathesis.hook
def before_call(context, case, kwargs):
    body = case.body
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = INFO.model_name
    if case.operation.path == "/v1/completions" and body.get("prompt", 0) in ("", None):
        body["prompt"] = "Hi"
