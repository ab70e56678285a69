"""Answers held against the OpenAPI document of the app that gave them."""

from __future__ import annotations

import copy
import json
import re

import httpx
from jsonschema import Draft202012Validator

# FastAPI's own, and what browsers ask before a request.
NOT_DESCRIBED = re.compile(r"/openapi\.json|/docs.*|/redoc")


class Contract:
    """Stricter than the document in one point: answers have no keys that it does not name."""

    def __init__(self, document):
        self._paths = {_pattern(path): operations for path, operations in document["paths"].items()}
        components = copy.deepcopy(document["components"])
        for schema in components["schemas"].values():
            if "properties" in schema:
                schema.setdefault("additionalProperties", False)
        self._components = components

    def check(self, response: httpx.Response) -> None:
        """Raises AssertionError, or jsonschema's ValidationError."""
        path, method = response.request.url.path, response.request.method
        if method == "OPTIONS" or NOT_DESCRIBED.fullmatch(path) or response.status_code == 499:
            return
        answer = self._answer(path, method, response.status_code)
        for name, header in answer["headers"].items():
            assert name in response.headers, f"{name} is missing"
            self.validate(response.headers[name], self._resolved(header)["schema"])
        contents = {_essence(name): content for name, content in answer["content"].items()}
        media_type = _essence(response.headers["content-type"])
        assert media_type in contents, f"{media_type} is not described"
        described = contents[media_type]
        if media_type == "application/json":
            self.validate(response.json(), described["schema"])
        elif media_type == "text/event-stream":
            kind, *ends = [kind["properties"]["data"] for kind in described["itemSchema"]["anyOf"]]
            events = list(_events(response.text))
            for end in ends:
                assert events.pop() == (None, end["const"])
            for name, data in events:
                value = json.loads(data)
                self.validate(value, kind["contentSchema"])
                assert name == value.get("type")

    def validate(self, value: object, schema: dict) -> None:
        """A value against a schema that may refer to the document's."""
        Draft202012Validator({**schema, "components": self._components}).validate(value)

    def _answer(self, path, method, status):
        operations = next((operations for pattern, operations in self._paths.items() if pattern.fullmatch(path)), None)
        if operations is None or method.lower() not in operations:
            # of every route, as documents have no place for what does not exist
            assert status in (401, 404, 405, 413)
            return self._components["responses"]["500"]
        answers = operations[method.lower()]["responses"]
        assert str(status) in answers, f"{status} of {method} {path} is not described"
        return self._resolved(answers[str(status)])

    def _resolved(self, node):
        if "$ref" not in node:
            return node
        _, _, kind, name = node["$ref"].split("/")
        return self._components[kind][name]


def _essence(media_type):
    return media_type.partition(";")[0]


def _pattern(path):
    return re.compile(re.sub(r"\{\w+\}", ".+", path))


def _events(text):
    """Names, None without one, and data. A comment is no event."""
    for block in text.split("\n\n"):
        if block and not block.startswith(":"):
            yield re.fullmatch("(?:event: (.*)\n)?data: (.*)", block).groups()
