"""What travels over HTTP: request bodies (pydantic, strict) and answers (msgspec structs, encoded once per frame)."""
