"""API keys: who a client is. Only SHA-256 digests are kept.

A key is written as the key itself, as `sha256:` and its digest in hexadecimal, or as either behind `NAME=`. The name says in logs
whose key it is, and limits are per name; several keys may have one, as when one replaces another. Digests are not salted: keys are
to be long and random (`openssl rand -hex 32`), which no list of digests helps to guess.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from medusa_core.errors import ConfigError
from server.limits import UNLIMITED, AtLeastOne, KeyLimits

logger = logging.getLogger(__name__)

# Safe in logs, labels and headers.
_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}")
# A random key in base64 is no shorter.
_MIN_BASE64_CHARS = 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# How often the file of keys is looked at for changes.
_FILE_CHECK_S = 5.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key's owner and digest."""

    name: str
    digest: bytes
    limits: KeyLimits


def hashed(entry: str) -> str:
    """An entry of --api-key as `NAME=sha256:DIGEST`. A key without a name is named by the beginning of its digest.

    Raises ValueError, whose text never holds the key.
    """
    name, separator, key = entry.partition("=")
    if not (separator and _NAME.fullmatch(name)):
        name, key = "", entry
    elif not key.strip("=") and len(entry) >= _MIN_BASE64_CHARS:
        # Not a name: base64 ends with equals signs. A short one is a name whose variable the shell had not set.
        name, key = "", entry
    digest = _digest_text(key)
    return f"{name or 'key-' + digest.removeprefix('sha256:')[:8]}={digest}"


def _digest_text(key: str) -> str:
    """`sha256:` and the digest of a key, which may be written so already. Raises ValueError."""
    if not key.strip("= "):
        raise ValueError("Keys must not be empty")
    if not key.startswith("sha256:"):
        return f"sha256:{digest_of(key.encode()).hex()}"
    if not _DIGEST.fullmatch(key.lower()):
        raise ValueError("A digest is 'sha256:' and 64 hexadecimal digits")
    return key.lower()


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _key(name: str, digest_text: str, limits: KeyLimits) -> ApiKey:
    return ApiKey(name, bytes.fromhex(digest_text.removeprefix("sha256:")), limits)


class _FileEntry(msgspec.Struct, forbid_unknown_fields=True):
    """A table of the file. key: one, or several while one replaces another."""

    key: str | list[str]
    requests_per_minute: AtLeastOne | None = None
    tokens_per_minute: AtLeastOne | None = None
    parallel_requests: AtLeastOne | None = None

    def limits(self, default: KeyLimits) -> KeyLimits:
        """What it leaves out is as for every key."""
        given = {name: value for name in KeyLimits.__struct_fields__ if (value := getattr(self, name)) is not None}
        return msgspec.structs.replace(default, **given)


def read_key_file(path: Path, default: KeyLimits) -> list[ApiKey]:
    """Keys of a TOML file: a table per name, with `key` and limits. Raises ConfigError, which never shows a key."""
    try:
        entries = msgspec.toml.decode(path.read_bytes(), type=dict[str, _FileEntry])
        return [
            _key(_checked_name(name), _digest_text(key), entry.limits(default))
            for name, entry in entries.items()
            for key in ([entry.key] if isinstance(entry.key, str) else entry.key)
        ]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--api-key-file {path}: {error}.", hint='It should have a table per name, such as [alice] with key = "sha256:...".'
        ) from error


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("names have 1 to 64 letters, digits and _ . @ -")
    return name


class Keyring:
    """The keys that are accepted. A file of keys that changes is read again, without a restart; while it is wrong, the keys before
    it stay."""

    def __init__(
        self,
        entries: Iterable[str] = (),
        file: str | None = None,
        *,
        limits: KeyLimits = UNLIMITED,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """entries: as in --api-key. limits: of keys that the file gives no others. Raises ConfigError."""
        pairs = [hashed(entry).rsplit("=", 1) for entry in entries]
        self._fixed = [_key(name, digest_text, limits) for name, digest_text in pairs]
        self._file = Path(file) if file is not None else None
        self._limits = limits
        self._clock = clock
        self._checked_s = clock()
        self._version = self._file_version()
        self._keys = self._fixed if self._file is None else [*self._fixed, *read_key_file(self._file, limits)]
        if not limits.is_unlimited and not self.is_used:
            raise ConfigError(
                "Limits of keys (--key-...) need keys: without, clients cannot be told apart.",
                hint="Give --api-key or --api-key-file.",
            )

    @property
    def is_used(self) -> bool:
        """Whether clients need a key at all. A file without any lets nobody in."""
        return bool(self._fixed) or self._file is not None

    def find(self, key: bytes) -> ApiKey | None:
        """The accepted key with these bytes."""
        self._refresh()
        digest = digest_of(key)
        # All are compared, so that the time does not tell which one matched.
        matches = [candidate for candidate in self._keys if hmac.compare_digest(digest, candidate.digest)]
        return matches[0] if matches else None

    def _refresh(self) -> None:
        if self._file is None or self._clock() - self._checked_s < _FILE_CHECK_S:
            return
        self._checked_s = self._clock()
        version = self._file_version()
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = [*self._fixed, *read_key_file(self._file, self._limits)]
            logger.info("--api-key-file: %d keys", len(self._keys))
        except ConfigError as error:
            logger.error("The keys stay as they were. %s", error)

    def _file_version(self) -> tuple[int, int, int] | None:
        """Changes with the file, also where another takes its place; None while there is none."""
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size
