"""When the tokenizer and its libraries are loaded."""

from __future__ import annotations

import threading

from medusa_core.text import TextProcessor
from server import serving
from server.settings import ServerSettings
from tests.server.fakes import INFO


def test_a_tokenizer_waits_until_its_libraries_are_imported(monkeypatch):
    may_import = threading.Event()
    events = []

    def import_tokenizers():
        may_import.wait()
        events.append("imported")

    monkeypatch.setattr(serving, "import_tokenizers", import_tokenizers)
    monkeypatch.setattr(TextProcessor, "load", lambda *_, **__: events.append("loaded"))
    load = serving.text_loader(ServerSettings())
    # The engine may be there already, as for a front end that takes another's place.
    loading = threading.Thread(target=load, args=(INFO,))
    loading.start()
    loading.join(0.1)
    may_import.set()
    loading.join()
    assert events == ["imported", "loaded"]
