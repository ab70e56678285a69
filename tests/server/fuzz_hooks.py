"""Loaded by schemathesis: made-up requests name the model that is served, or no one would get past the check of the name."""

from __future__ import annotations

import schemathesis

from tests.server.fakes import INFO


@schemathesis.hook
def before_call(context, case, kwargs):
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = INFO.model_name
